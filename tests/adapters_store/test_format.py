"""The two files of a checkpoint, as files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from manylora.adapters_store.format import open_checkpoint, read_checkpoint
from manylora.adapters_store.limits import Limits
from manylora.errors import DataLoss, InvalidArgument

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def test_sound_checkpoint(tmp_path: Path, write_checkpoint) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "README.md").write_text("ignored")
    (tmp_path / "training_args.bin").write_bytes(b"ignored")
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.config["peft_type"] == "LORA"
    loaded = checkpoint.load(checkpoint.tensors)
    expected = load_file(tmp_path / WEIGHTS)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_any_part_of_a_file_with_several_dtypes(tmp_path: Path, write_checkpoint) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    names = [f"t{i}" for i in range(12)]
    write_checkpoint(
        tmp_path,
        tensors={
            name: torch.full((i % 4, 3), float(i), dtype=dtypes[i % 3])
            for i, name in enumerate(names)
        },
    )
    expected = load_file(tmp_path / WEIGHTS)
    checkpoint = read_checkpoint(tmp_path)
    for some in (names[::-1], names[3:7], names[1::5], []):
        loaded = checkpoint.load(some)
        assert loaded.keys() == set(some)
        for name in some:
            assert loaded[name].dtype == expected[name].dtype
            assert torch.equal(loaded[name], expected[name])


def test_the_first_value_that_is_not_finite_is_named(tmp_path: Path, write_checkpoint) -> None:
    tensors = {name: torch.ones(50_000) for name in ("a", "b", "c")}
    tensors["b"][-1] = float("inf")
    tensors["c"][0] = float("nan")
    write_checkpoint(tmp_path, tensors=tensors)
    with pytest.raises(InvalidArgument, match="not finite") as caught:
        read_checkpoint(tmp_path)
    assert (caught.value.field, caught.value.found) == (f"{WEIGHTS}: b", "infinity")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, 1_500_000, 3_000_000 - 1])
def test_weights_must_be_finite(
    tmp_path: Path, write_checkpoint, dtype: torch.dtype, value: float, position: int
) -> None:
    weights = torch.ones(3_000_000, dtype=dtype)
    weights[position] = value
    write_checkpoint(tmp_path, tensors={"sound": torch.ones(3), "broken": weights})
    with pytest.raises(InvalidArgument, match="not finite") as caught:
        read_checkpoint(tmp_path)
    assert caught.value.field == f"{WEIGHTS}: broken"
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.load(["sound"])["sound"].tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(InvalidArgument, match="not finite") as caught:
        checkpoint.load(["broken"])
    assert caught.value.field == f"{WEIGHTS}: broken"


def test_largest_finite_values_pass(tmp_path: Path, write_checkpoint) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        limits = torch.finfo(dtype)
        write_checkpoint(
            tmp_path, tensors={"a": torch.tensor([limits.max, limits.min], dtype=dtype)}
        )
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b'"LORA"', "not a JSON object"),
        (b'{"r": 4, "r": 8}', "'r' occurs twice"),
        (b'{"lora_alpha": Infinity}', "not a JSON number"),
        (b'{"lora_alpha": -1e400}', "out of range"),
        (b'{"r": 4', "not valid JSON"),
        (b'{"r": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b'{"\xe2\x28": 1}', "not valid JSON"),
        (b'{"a": ' * 3000, "nested too deeply|not valid"),
    ],
)
def test_config_must_be_strict_json(
    tmp_path: Path, write_checkpoint, text: bytes, message: str
) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / CONFIG).write_bytes(text)
    with pytest.raises(InvalidArgument, match=message) as caught:
        read_checkpoint(tmp_path)
    assert caught.value.field == CONFIG


def test_size_limits_come_before_reading(tmp_path: Path, write_checkpoint) -> None:
    write_checkpoint(tmp_path)
    os.truncate(tmp_path / WEIGHTS, 1 << 40)  # sparse; reading it would take for ever
    with pytest.raises(InvalidArgument, match=r"too large.*1099511627776 bytes"):
        read_checkpoint(tmp_path)
    os.truncate(tmp_path / CONFIG, 1 << 40)
    with pytest.raises(InvalidArgument, match=f"{CONFIG}: file is too large"):
        read_checkpoint(tmp_path)


def test_tensor_count_limit(tmp_path: Path, write_checkpoint) -> None:
    write_checkpoint(tmp_path)
    with pytest.raises(InvalidArgument, match="too many tensors; found 4; wanted at most 3"):
        read_checkpoint(tmp_path, Limits(max_tensors=3))


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_links_are_not_followed(tmp_path: Path, write_checkpoint, name: str) -> None:
    outside = write_checkpoint(tmp_path / "outside")
    inside = write_checkpoint(tmp_path / "inside")
    (inside / name).unlink()
    (inside / name).symlink_to(outside / name)
    with pytest.raises(InvalidArgument, match=f"{name}: links are not followed"):
        read_checkpoint(inside)


def test_only_regular_files(tmp_path: Path, write_checkpoint) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    os.mkfifo(tmp_path / WEIGHTS)  # opening it for reading would wait for a writer
    with pytest.raises(InvalidArgument, match="not a regular file"):
        read_checkpoint(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / WEIGHTS).mkdir()
    with pytest.raises(InvalidArgument, match="not a regular file"):
        read_checkpoint(tmp_path)


def test_missing_files(tmp_path: Path, write_checkpoint) -> None:
    with pytest.raises(InvalidArgument, match="cannot open the checkpoint's directory"):
        read_checkpoint(tmp_path / "nowhere")
    with pytest.raises(InvalidArgument, match=f"{CONFIG}: the checkpoint lacks this file"):
        read_checkpoint(tmp_path)
    write_checkpoint(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(InvalidArgument, match=f"{WEIGHTS}: the checkpoint lacks this file"):
        read_checkpoint(tmp_path)


def test_pickled_weights_are_refused_by_name(tmp_path: Path, write_checkpoint) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    torch.save({"a": torch.ones(2)}, tmp_path / "adapter_model.bin")
    with pytest.raises(InvalidArgument, match=r"adapter_model\.bin: pickled weights are not read"):
        read_checkpoint(tmp_path)


def test_file_that_shrinks_after_the_check(tmp_path: Path, write_checkpoint) -> None:
    checkpoint = read_checkpoint(write_checkpoint(tmp_path))
    os.truncate(tmp_path / WEIGHTS, (tmp_path / WEIGHTS).stat().st_size - 4)
    with pytest.raises(DataLoss, match="shrank"):
        checkpoint.load(checkpoint.tensors)
