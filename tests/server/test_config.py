"""Settings: where a value may come from, which place wins, and what a wrong one says."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from manylora.errors import InvalidArgument
from manylora.kernels.backend import BACKENDS
from manylora.server.config import ENV_PREFIX, Settings, default_store, load_settings
from manylora.server.engine.settings import EngineSettings


@pytest.fixture(autouse=True)
def _a_clean_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings in the environment; "m" is a checkpoint's directory."""
    for name in Settings.model_fields:
        monkeypatch.delenv(ENV_PREFIX + name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)
    Path("m").mkdir()
    Path("m/config.json").touch()


def _toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "manylora.toml"
    path.write_text(text)
    return path


def test_flag_beats_environment_beats_file_beats_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _toml(tmp_path, 'model = "m"\nport = 1\nmax_sequences = 1\nmax_waiting = 1\n')
    monkeypatch.setenv("MANYLORA_PORT", "2")
    monkeypatch.setenv("MANYLORA_MAX_SEQUENCES", "2")
    settings = load_settings({"config": path, "port": 3})
    assert (settings.port, settings.max_sequences, settings.max_waiting) == (3, 2, 1)
    assert settings.max_batch_tokens == EngineSettings(Path()).max_batch_tokens


def test_file_may_be_named_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYLORA_CONFIG", str(_toml(tmp_path, 'model = "m"\nport = 1\n')))
    assert load_settings({}).port == 1


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 << 30), ("1.5 MB", 1_500_000), (4096, 4096), ("64", 64)]
)
def test_sizes(text: object, size: int) -> None:
    assert load_settings({"model": "m", "kv_cache_bytes": text}).engine().kv_cache_bytes == size


def test_lists_of_paths_from_every_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = (Path("/a"), Path("/b"))
    assert load_settings({"model": "m", "import_roots": ["/a", "/b"]}).import_roots == both
    path = _toml(tmp_path, 'model = "m"\nimport_roots = ["/a", "/b"]\n')
    assert load_settings({"config": path}).import_roots == both
    monkeypatch.setenv("MANYLORA_IMPORT_ROOTS", "/a:/b")
    assert load_settings({"model": "m"}).import_roots == both


def test_every_kernel_backend_can_be_chosen() -> None:
    assert set(get_args(Settings.model_fields["kernels"].annotation)) == {"auto", *BACKENDS}


def test_engine_gets_every_field() -> None:
    given: dict[str, object] = {
        "model": Path("m"),
        "model_name": "base",
        "dtype": "float32",
        "quantization": "int8",
        "device": "cpu",
        "kernels": "reference",
        "prefix_cache": False,
    }
    numbers = [f.name for f in fields(EngineSettings) if f.name not in given]
    given |= {name: 16 * i for i, name in enumerate(numbers, 1)}
    assert load_settings(given).engine() == EngineSettings(**given)  # type: ignore[arg-type]


def test_store_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_store() == Path("/data/manylora/store")


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ({}, "model"),
        ({"model": "elsewhere"}, "--model"),
        ({"model": "m", "port": "99999"}, "--port"),
        ({"model": "m", "kv_cache_bytes": "2 bananas"}, "--kv-cache-bytes"),
        ({"model": "m", "kv_cache_bytes": "-1"}, "--kv-cache-bytes"),
        ({"model": "m", "dtype": "int3"}, "--dtype"),
        ({"model": "m", "max_sequences": "0"}, "--max-sequences"),
        ({"model": "m", "drain_seconds": "soon"}, "--drain-seconds"),
        ({"config": "/nowhere.toml"}, "config"),
    ],
)
def test_wrong_values_name_their_flag(flags: dict[str, str], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        load_settings(flags)
    assert caught.value.field == field


def test_wrong_values_name_their_variable_or_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidArgument, match=r"^port: .*found x"):
        load_settings({"config": _toml(tmp_path, 'model = "m"\nport = "x"\n')})
    with pytest.raises(InvalidArgument, match=r"^prot: no such setting"):
        load_settings({"config": _toml(tmp_path, 'model = "m"\nprot = 1\n')})
    with pytest.raises(InvalidArgument, match=r"^config: not TOML"):
        load_settings({"config": _toml(tmp_path, "model = ")})
    monkeypatch.setenv("MANYLORA_PORT", "x")
    with pytest.raises(InvalidArgument, match=r"^MANYLORA_PORT: .*integer"):
        load_settings({"model": "m"})


def test_every_setting_is_described() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description and field.description.endswith("."), name
