"""The command line: usage, errors, and the client commands against a real server."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
from manylora_testing.adapters import tiny_lora
from manylora_testing.classifiers import make_task_adapter
from manylora_testing.models import tiny_model
from manylora_testing.serve_process import ServeProcess
from manylora_testing.tokenizer import TOKENIZER_VOCAB, tiny_tokenizer

from manylora import __version__, errors
from manylora.adapters_store.store import Store
from manylora.client import Client
from manylora.server.cli import main
from manylora.server.cli.output import human_bytes, print_error, printable
from manylora.server.config import Settings, flag_name


@dataclass
class Answer:
    code: int
    out: str
    err: str


Cli = Callable[..., Answer]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs `manylora ARGUMENTS` in this process."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str | Path, stdin: bytes = b"") -> Answer:
        monkeypatch.setattr(sys, "argv", ["manylora", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return Answer(code, *capsys.readouterr())

    return run


# -- without a server --------------------------------------------------------------------------


def test_version(cli: Cli) -> None:
    assert cli("--version") == Answer(0, f"manylora {__version__}\n", "")


def test_help_lists_every_command(cli: Cli) -> None:
    text = cli("--help").out
    for command in (
        *("serve", "train", "adapters", "generate", "classify", "embed"),
        *("check", "merge", "demo", "doctor"),
    ):
        assert f" {command} " in text


def test_serve_has_a_flag_with_the_description_of_every_setting(cli: Cli) -> None:
    words = " ".join(cli("serve", "--help").out.replace("│", " ").split())
    for name, field in Settings.model_fields.items():
        assert flag_name(name) in words
        assert (field.description or "")[:60].rsplit(" ", 1)[0] in words


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve",),
        ("serve", "--model", "m", "--port", "x"),
        ("serve", "--model", "m", "--bogus", "1"),
        ("serve", "--config", "/nowhere.toml"),
        ("generate", "--system", "x", "hi"),
        ("generate", "--max-tokens", "many", "hi"),
        ("adapters", "publish", "only-a-name"),
        ("adapters", "show", "tenant/\udcff"),  # as Python reads a byte that is not UTF-8
        ("train", "--base", "b"),
        ("demo", "--bogus"),
        ("nothing",),
    ],
)
def test_wrong_usage_is_2_without_a_traceback(cli: Cli, arguments: tuple[str, ...]) -> None:
    answer = cli(*arguments)
    assert answer.code == 2
    assert answer.out == ""
    assert "rror" in answer.err
    assert "Traceback" not in answer.err


def test_an_error_is_one_line_with_field_found_and_wanted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_error(
        errors.InvalidArgument(
            "out of range\nhere", field="sampling.top_p", found="\x1b[2J7", wanted="up to 1"
        )
    )
    line = capsys.readouterr().err
    assert line == (
        "error: sampling.top_p: out of range here; found \N{REPLACEMENT CHARACTER}[2J7; "
        "wanted up to 1\n"
    )


def test_no_server_is_one_line_and_1(cli: Cli) -> None:
    answer = cli("adapters", "list", "--server", "127.0.0.1:1")
    assert answer.code == 1
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    assert "127.0.0.1:1" in answer.err


def test_serve_says_what_is_wrong_with_the_model(cli: Cli, tmp_path: Path) -> None:
    answer = cli("serve", "--model", tmp_path)
    assert answer.code == 2
    assert answer.err == (
        f"error: --model: not accepted; found {tmp_path}; wanted the directory of a Hugging Face "
        "checkpoint, with its config.json\n"
    )


def test_doctor(cli: Cli) -> None:
    facts = json.loads(cli("doctor", "--json").out)
    assert facts["manylora"] == __version__
    assert facts["torch"].startswith("2.")
    assert facts["kernels"] in ("reference", "cpu", "triton")
    assert facts["C++ kernels"].startswith(("built; ", "not built: "))
    table = cli("doctor").out
    for value in facts.values():
        assert value in table


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 40, "3.0 TiB")],
)
def test_sizes(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_printable_keeps_text_and_drops_control() -> None:
    family = "\N{MAN}\N{ZERO WIDTH JOINER}\N{GIRL}"
    assert printable(f"a\tb\n{family}é") == f"a\tb\n{family}é"
    assert printable("\x1b]0;x\x07\x9b\udcff") == "\ufffd]0;x\ufffd\ufffd\ufffd"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    return tiny_tokenizer(tiny_model("qwen3", directory, vocab_size=TOKENIZER_VOCAB))


def test_train_publishes_to_the_store(cli: Cli, model: Path, tmp_path: Path) -> None:
    data, store = tmp_path / "rows.jsonl", tmp_path / "store"
    row = {"prompt": "the printer", "completion": " is on fire"}
    data.write_text(f"{json.dumps(row)}\n" * 4)
    flags = ("--rank", "2", "--target-modules", "q_proj", "--epochs", "1", "--dtype", "float32")
    answer = cli(
        *("train", "--base", model, "--data", data, "--name", "t/new", *flags),
        *("--output", tmp_path / "out", "--publish", "--store", store),
    )
    assert answer.code == 0, answer.err
    assert answer.out == "t/new@1\n"
    with closing(Store(store)) as opened:
        assert opened.resolve("t/new").rank == 2


def test_train_names_the_wrong_setting(cli: Cli, tmp_path: Path) -> None:
    answer = cli(*("train", "--base", tmp_path, "--data", tmp_path, "--name", "t/x", "--rank", "0"))
    assert answer.code == 2
    assert answer.err == "error: rank: not accepted; found 0; wanted 1 or more\n"


# -- with a server -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    return tiny_lora(model, directory, r=4, alpha=64, targets="all-linear", seed=3)


@pytest.fixture(scope="module")
def address(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    flags = ("--dtype", "float32", "--kv-cache-bytes", "8MiB", "--adapter-bytes", "8MiB")
    with ServeProcess.start(tmp_path_factory.mktemp("server"), model, flags) as server:
        yield server.grpc


@pytest.fixture
def here(cli: Cli, address: str, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("MANYLORA_SERVER", address)
    return cli


def test_an_adapters_life(here: Cli, adapter: Path) -> None:
    published = here("adapters", "publish", "t/life", adapter, "--alias", "prod")
    assert published == Answer(0, "t/life@1\n", "")
    assert here("adapters", "publish", "t/life", adapter) == published

    listed = json.loads(here("adapters", "list", "t", "--json").out)
    assert [entry["adapter"] for entry in listed] == ["t/life@1"]
    assert listed[0]["aliases"] == ["prod"]
    assert listed[0]["residency"] is None

    note = here("adapters", "load", "t/life:prod", "--pin")
    assert note.code == 0
    assert "t/life@1: resident" in note.err
    assert "pinned" in here("adapters", "list").out
    shown = json.loads(here("adapters", "show", "t/life", "--json").out)
    assert shown["rank"] == 4
    assert shown["residency"]["pinned"]
    assert shown["digest"] in here("adapters", "show", "t/life@1").out

    assert here("adapters", "unload", "t/life").code == 0
    refused = here("adapters", "unload", "t/life")
    assert refused.code == 1
    assert "not resident" in refused.err

    assert here("adapters", "delete", "t/life", stdin=b"n\n").code == 1
    assert here("adapters", "show", "t/life").code == 0
    assert here("adapters", "delete", "t/life", "--yes").code == 0
    gone = here("adapters", "show", "t/life")
    assert gone.code == 1
    assert "no such adapter" in gone.err


def test_generate_streams_what_the_client_gets(here: Cli, adapter: Path, address: str) -> None:
    assert here("adapters", "publish", "t/gen", adapter).out == "t/gen@1\n"
    with Client(address) as client:
        texts = {client.generate("the printer", adapter=name).text for name in ("", "t/gen")}
        assert len(texts) == 2
        for name in ("", "t/gen"):
            want = client.generate("the printer", adapter=name, max_tokens=12, ignore_eos=True)
            flags = ("--adapter", name, "--max-tokens", "12", "--ignore-eos")
            assert here("generate", "the printer", *flags).out.rstrip("\n") == want.text.rstrip(
                "\n"
            )
            got = json.loads(here("generate", "-", *flags, "--json", stdin=b"the printer\n").out)
            assert got["text"] == want.text
            assert got["token_ids"] == list(want.token_ids)
            assert got["adapter"] == want.adapter
            assert got["finish_reason"] == "length"
            assert got["usage"]["completion_tokens"] == 12


def test_generate_through_the_chat_template(here: Cli, address: str) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]
    with Client(address) as client:
        want = client.generate(messages=messages, max_tokens=5, ignore_eos=True)
    flags = ("--max-tokens", "5", "--ignore-eos", "--json")
    answer = here("generate", "--chat", "--system", "Be kind.", "hi", *flags)
    assert json.loads(answer.out)["text"] == want.text
    assert json.loads(answer.out)["usage"]["prompt_tokens"] == want.usage.prompt_tokens


@pytest.fixture(scope="module")
def classifiers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("classifiers")
    return {
        task: make_task_adapter(
            model, root / task, task, peft.LoraConfig(target_modules=["q_proj"])
        )
        for task in ("SEQ_CLS", "TOKEN_CLS")
    }


@pytest.mark.filterwarnings("ignore")
def test_classes_and_vectors(here: Cli, classifiers: dict[str, Path], address: str) -> None:
    assert here("adapters", "publish", "t/seq", classifiers["SEQ_CLS"]).out == "t/seq@1\n"
    assert here("adapters", "publish", "t/tok", classifiers["TOKEN_CLS"]).out == "t/tok@1\n"
    text, second = "the printer", "naïve café"
    with Client(address) as client:
        for flags, pair in (((), None), (("--second", second), (text, second))):
            alone = text if pair is None else None
            classes = client.classify(alone, pair=pair, adapter="t/seq")
            table = here("classify", text, *flags, "--adapter", "t/seq").out.splitlines()
            assert table[0].split() == ["label", "score", "logit"]
            best = max(classes.scores)
            assert table[1].split()[:2] == [classes.label, f"{best:.4f}"]
            shown = json.loads(here("classify", text, *flags, "-a", "t/seq", "--json").out)
            assert shown["scores"] == list(classes.scores)
            tokens = client.classify_tokens(alone, pair=pair, adapter="t/tok").tokens
            rows = here("classify", text, *flags, "-a", "t/tok", "--tokens").out.splitlines()[1:]
            assert [row.split()[-2] for row in rows] == [token.label for token in tokens]
            assert rows[1].split()[0] == text[slice(*(tokens[1].span or ()))]
            vector = client.embed(alone, pair=pair, pooling="mean", normalize=True)
            shown = here("embed", text, *flags, "--pooling", "mean", "--normalize").out
            assert json.loads(shown)["embedding"] == list(vector.embedding)
    assert here("classify", text).code == 1


def test_the_servers_errors_arrive_whole(here: Cli) -> None:
    answer = here("generate", "hi", "--top-p", "7")
    assert answer.code == 2
    assert answer.err.startswith("error: sampling.top_p: ")
    assert "found 7" in answer.err
    answer = here("generate", "hi", "--adapter", "t/nobody")
    assert answer.code == 1
    assert "t/nobody" in answer.err
    assert here("generate", stdin=b"\xff").code == 2


def test_output_may_be_cut_off(model: Path, address: str) -> None:
    command = [sys.executable, "-m", "manylora.server.cli", "generate", "x", "--server", address]
    with subprocess.Popen(
        [*command, "--max-tokens", "100", "--ignore-eos"],
        cwd=model,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
