"""A bfloat16 Llama checkpoint as GGUF, without its tokenizer: prompts are token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

LENGTH_BYTES = 8  # of a safetensors file's header


def write_gguf(model: Path, file: Path) -> None:
    """model: a checkpoint's directory, its weights in one file. file: written whole or not at all.

    llama.cpp turns neighbouring rows of a head together, as the original Llama does, and
    transformers a head's halves: so the rows of q and k are put in the other order.
    """
    config = json.loads((model / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    aside = file.with_suffix(".tmp")
    writer = gguf.GGUFWriter(aside, "llama")
    _add_settings(writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for key, value in read_bfloat16(model / "model.safetensors"):
        module = key.split(".")[-2]
        rows = interleave_halves(value, heads[module]) if module in heads else value
        name = names.get_name(key, try_suffixes=(".weight",))
        if rows.ndim == 1:
            writer.add_tensor(name, (rows.astype(np.uint32) << 16).view(np.float32))
        else:
            raw = np.ascontiguousarray(rows).view(np.uint8)
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    aside.rename(file)


def read_bfloat16(file: Path) -> Iterator[tuple[str, Any]]:
    """Names and tensors of a safetensors file, as the uint16 that bfloat16 is made of."""
    data = np.memmap(file, np.uint8, "r")
    length = int(data[:LENGTH_BYTES].view("<u8")[0])
    header = json.loads(data[LENGTH_BYTES : LENGTH_BYTES + length].tobytes())
    for key, info in header.items():
        if key == "__metadata__":
            continue
        if info["dtype"] != "BF16":
            raise ValueError(f"{key} is {info['dtype']}, not BF16")
        start, end = (LENGTH_BYTES + length + offset for offset in info["data_offsets"])
        yield key, data[start:end].copy().view(np.uint16).reshape(info["shape"])


def interleave_halves(weight: Any, heads: int) -> Any:
    """[heads * size, in]: each head's rows 0, 1, 2 … become 0, size/2, 1, size/2 + 1 …"""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _add_settings(writer: Any, config: dict[str, Any]) -> None:
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(float(theta))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
