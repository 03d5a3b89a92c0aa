"""The demo's adapters: trained once for each base, data set and settings, then taken from the
cache; and published once for each."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from manylora.adapters_store.files import CONFIG_FILE
from manylora.adapters_store.store import Store
from manylora.demo.tasks import Task
from manylora.errors import NotFound
from manylora.training import train

_NOT_IN_KEY = ("base", "data", "output", "resume")


@dataclass(slots=True, frozen=True)
class Trained:
    """An adapter on disk, and the seconds that training it took; 0 if it was there already."""

    task: Task
    directory: Path
    key: str  # of base, rows and settings, 12 hexadecimal digits
    seconds: float


def get_adapter(task: Task, base: Path, cache: Path, console: Console) -> Trained:
    """Trains the task's adapter unless the cache has it; an interrupted training goes on."""
    key = _key(task, base)
    directory = cache / "adapters" / f"{task.name}-{key}"
    began = time.monotonic()
    if (directory / CONFIG_FILE).exists():
        return Trained(task, directory, key, 0.0)
    train(task.train_settings(base, directory), console)
    return Trained(task, directory, key, time.monotonic() - began)


def publish(adapter: Trained, store_root: Path) -> str:
    """Publishes the adapter unless the store has it. Returns "tenant/adapter@version"."""
    store = Store(store_root)
    try:
        try:
            version = store.resolve(f"{adapter.task.adapter}:{adapter.key}")
        except NotFound:
            version = store.publish(adapter.task.adapter, adapter.directory, [adapter.key])
        return version.label
    finally:
        store.close()


def _key(task: Task, base: Path) -> str:
    settings = asdict(task.train_settings(base, Path()))
    told = {name: str(value) for name, value in settings.items() if name not in _NOT_IN_KEY}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    digest.update(task.train_file.read_bytes())
    for path in sorted(base.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]
