"""Every setting of `manylora serve`, described once.

A value is taken from the first place that has one: the command line's flag, the environment
(`MANYLORA_KV_CACHE_BYTES`), the TOML file named by `--config` or `MANYLORA_CONFIG`
(`kv_cache_bytes = "2GiB"`), the default. All three pass the same checks.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from manylora.errors import InvalidArgument
from manylora.server.engine.settings import EngineSettings

ENV_PREFIX = "MANYLORA_"
_ENGINE = EngineSettings(model=Path())


def default_store() -> Path:
    """Where adapters are kept when nobody says otherwise (XDG base directory specification)."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "manylora" / "store"


class Settings(BaseSettings):
    """What `manylora serve` runs with. Names shared with EngineSettings mean the same there."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
    )

    config: Path | None = Field(None, description="TOML file with any of these settings.")

    model: Path = Field(description="Directory of the Hugging Face checkpoint that stays resident.")
    model_name: str = Field(
        _ENGINE.model_name, description="What clients see; empty: the directory's name."
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="The base's data type; auto: the checkpoint's own."
    )
    quantization: Literal["none", "int8"] = Field(
        "none",
        description="int8: the base's weights in 8 bits, made at load; half the memory, other "
        "logits. Only on CPUs with VNNI.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where the base runs; auto: the best device there is."
    )
    kernels: Literal["auto", "reference", "cpu", "triton"] = Field(
        "auto", description="Kernel backend; auto: the device's best."
    )
    max_context: int = Field(
        _ENGINE.max_context, ge=0, description="Tokens of prompt and answer; 0: the model's limit."
    )

    kv_cache_bytes: ByteSize = Field(
        ByteSize(_ENGINE.kv_cache_bytes), gt=0, description="Memory for the KV cache."
    )
    block_size: int = Field(
        _ENGINE.block_size, ge=16, multiple_of=16, description="KV positions in a block."
    )
    prefix_cache: bool = Field(
        _ENGINE.prefix_cache, description="Share the KV blocks of equal prompt beginnings."
    )
    adapter_bytes: ByteSize = Field(
        ByteSize(_ENGINE.adapter_bytes), gt=0, description="Memory for resident adapters."
    )
    max_adapters: int = Field(_ENGINE.max_adapters, ge=1, description="Adapters resident at once.")
    loader_threads: int = Field(
        _ENGINE.loader_threads, ge=1, description="Threads that load adapters."
    )

    max_batch_tokens: int = Field(_ENGINE.max_batch_tokens, ge=1, description="Rows in a step.")
    max_sequences: int = Field(_ENGINE.max_sequences, ge=1, description="Requests running at once.")
    max_waiting: int = Field(
        _ENGINE.max_waiting,
        ge=0,
        description="Requests that may wait; of more, some are refused with RESOURCE_EXHAUSTED.",
    )

    store: Path = Field(
        default_factory=default_store, description="Directory of the adapter store."
    )
    import_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        (),
        description="Directories that clients may import adapters from; the environment variable "
        f"separates them with '{os.pathsep}'.",
    )

    allow_pickles: bool = Field(
        False,
        description="Take adapter_model.bin, through torch's weights-only loader, and convert it.",
    )

    host: str = Field(
        "127.0.0.1",
        description="Address to listen on. There is no authentication yet: keep it private.",
    )
    port: int = Field(50051, ge=0, le=65535, description="gRPC port; 0: any free one.")
    http_port: int = Field(
        9464, ge=0, le=65535, description="Port of /metrics, /healthz and /readyz; 0: any free one."
    )
    drain_seconds: float = Field(
        30.0, ge=0, description="How long running requests may go on after SIGTERM."
    )
    metric_adapters: int = Field(
        100,
        ge=0,
        description="Adapters with counters of their own in /metrics; later ones count as 'other'.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least important messages to log."
    )

    @field_validator("model")
    @classmethod
    def _is_checkpoint(cls, value: Path) -> Path:
        if not (value / "config.json").is_file():
            raise PydanticCustomError(
                "checkpoint",
                "Input should be the directory of a Hugging Face checkpoint, with its config.json",
            )
        return value

    @field_validator("import_roots", mode="before")
    @classmethod
    def _split_paths(cls, value: object) -> object:
        if isinstance(value, str):
            return [path for path in value.split(os.pathsep) if path]
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the base's signature
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        config = init_settings().get("config") or env_settings().get("config")
        if config is None:
            return init_settings, env_settings
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, _file(config))

    def engine(self) -> EngineSettings:
        """The part that the engine is told."""
        return EngineSettings(**{f.name: getattr(self, f.name) for f in fields(EngineSettings)})


def load_settings(flags: Mapping[str, Any]) -> Settings:
    """Settings from the flags that were given, the environment and the TOML file.

    Raises:
        InvalidArgument: a value is wrong or missing; `field` is the flag, the environment
            variable or the file's key that it came from.
    """
    try:
        return Settings(**flags)
    except ValidationError as error:
        raise _explain(error, flags) from None
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument(f"not TOML: {error}", field="config") from None


def flag_name(setting: str) -> str:
    """The command line's word for a setting."""
    return "--" + setting.replace("_", "-")


def _file(config: object) -> Path:
    path = Path(str(config))
    if not path.is_file():
        raise InvalidArgument("no such file", field="config", found=path, wanted="a TOML file")
    return path


def _explain(error: ValidationError, flags: Mapping[str, object]) -> InvalidArgument:
    first: Any = error.errors()[0]
    setting = str(first["loc"][0])
    if first["type"] == "missing":
        return InvalidArgument(
            "not set",
            field=setting,
            wanted=f"{flag_name(setting)}, {ENV_PREFIX}{setting.upper()} or the TOML file",
        )
    if first["type"] == "extra_forbidden":
        return InvalidArgument("no such setting", field=setting)
    field = setting
    if setting in flags:
        field = flag_name(setting)
    elif ENV_PREFIX + setting.upper() in os.environ:
        field = ENV_PREFIX + setting.upper()
    message, prefix, wanted = str(first["msg"]).partition("Input should be ")
    if not prefix:
        return InvalidArgument(message, field=field, found=first["input"])
    return InvalidArgument("not accepted", field=field, found=first["input"], wanted=wanted)
