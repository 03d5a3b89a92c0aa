"""Several processes on one store: killed at any moment, and publishing at once."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from manylora.adapters_store import database, objects, store
from manylora.adapters_store.objects import digest_of
from manylora.adapters_store.store import Store
from manylora.errors import NotFound

KEEPING = {module.__file__ for module in (database, objects, store)}
STRIDE = 4  # shorter than any stretch of lines that a kill must not tear apart
Sources = list[Path]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Any) -> Sources:
    root = tmp_path_factory.mktemp("sources")
    return [write_checkpoint(root / str(seed), seed=seed) for seed in range(12)]


def fork(work: Callable[[], None]) -> int:
    """Runs work in a child of this process, which exits with 0 if it returned."""
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class KillAtLine:
    """Counts the lines that run where the store is changed; kills this process at one of them."""

    def __init__(self, line: int | None) -> None:
        self.lines = 0
        self._kill_at = line

    def trace(self, frame: FrameType, event: str, _arg: object) -> Any:
        if frame.f_code.co_filename not in KEEPING:
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self._kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.trace


def life(root: Path, sources: Sources, round: int) -> None:
    """All that changes a store, from opening it on."""
    store = Store(root)
    with contextlib.suppress(NotFound):
        store.delete("acme/passing")
    store.publish("acme/steady", sources[round % 6], ["prod"])
    gone = store.publish("acme/passing", sources[6 + round % 3])
    store.publish("acme/passing", sources[9 + round % 3], ["prod"])
    store.delete(gone.label)
    store.set_alias("acme/steady", "canary")
    store.delete("acme/passing")
    store.close()


def test_killed_at_any_line(tmp_path: Path, sources: Sources, assert_whole: Any) -> None:
    counter, before = KillAtLine(None), sys.gettrace()
    sys.settrace(counter.trace)
    try:
        life(tmp_path / "measured", sources, 0)
    finally:
        sys.settrace(before)
    assert counter.lines > 500
    known = {digest_of(source) for source in sources}
    last = 0
    for round, line in enumerate(range(1, counter.lines, STRIDE)):
        child = fork(lambda r=round, n=line: traced_life(tmp_path / "store", sources, r, n))
        assert exit_code(child) == -signal.SIGKILL
        assert_whole(tmp_path / "store")
        versions = steady_versions(tmp_path / "store")
        assert {version.digest for version in versions} <= known
        numbers = [version.version for version in versions]
        assert numbers == sorted(set(numbers))
        assert last <= (numbers or [0])[-1] <= last + 1
        last = (numbers or [0])[-1]
    life(tmp_path / "store", sources, 3)
    assert_whole(tmp_path / "store")
    assert last > 20


def traced_life(root: Path, sources: Sources, round: int, line: int) -> None:
    sys.settrace(KillAtLine(line).trace)
    life(root, sources, round)


def steady_versions(root: Path) -> tuple[Any, ...]:
    store = Store(root)
    try:
        return store.versions("acme/steady")
    except NotFound:
        return ()
    finally:
        store.close()


def test_killed_at_any_time(tmp_path: Path, sources: Sources, assert_whole: Any) -> None:
    """As above, from outside, so that system calls are cut short as well."""
    moments = random.Random(1)
    for _ in range(12):
        child = fork(lambda: live_on(tmp_path / "store", sources))
        while not (tmp_path / "store" / "in-use.lock").exists():
            os.sched_yield()
        time.sleep(moments.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        assert exit_code(child) == -signal.SIGKILL
        assert_whole(tmp_path / "store")


def live_on(root: Path, sources: Sources) -> None:
    for round in range(1_000_000):
        life(root, sources, round)


def test_threads_publish_one_name(tmp_path: Path, sources: Sources, assert_whole: Any) -> None:
    store = Store(tmp_path / "store")
    with ThreadPoolExecutor(8) as pool:
        published = list(pool.map(lambda source: store.publish("acme/one", source), sources))
    assert sorted(version.version for version in published) == list(range(1, 13))
    for version, source in zip(published, sources, strict=True):
        assert version.digest == digest_of(source)
        assert store.resolve(version.label) == version
    store.close()
    assert_whole(tmp_path / "store")


def test_processes_publish_one_name(tmp_path: Path, sources: Sources, assert_whole: Any) -> None:
    """Each publishes its own contents; all get numbers of their own, and no gap is left."""
    root = tmp_path / "store"

    def publish(mine: Sources) -> None:
        store = Store(root)
        for source in mine:
            version = store.publish("acme/one", source)
            assert version.digest == digest_of(source)
            assert store.resolve(version.label).digest == version.digest

    children = [fork(lambda part=part: publish(sources[part::3])) for part in range(3)]
    assert [exit_code(child) for child in children] == [0, 0, 0]
    store = Store(root)
    versions = store.versions("acme/one")
    assert [version.version for version in versions] == list(range(1, 13))
    assert {version.digest for version in versions} == {digest_of(source) for source in sources}
    store.close()
    assert_whole(root)


def test_one_content_published_and_deleted_by_all(
    tmp_path: Path, sources: Sources, assert_whole: Any
) -> None:
    """A content that somebody deletes stays as long as anybody else's version has it."""
    root = tmp_path / "store"

    def come_and_go(name: str) -> None:
        store = Store(root)
        for _ in range(12):
            version = store.publish(name, sources[0])
            assert (store.open_object(version.digest) / "adapter_config.json").exists()
            store.delete(name)

    children = [fork(lambda n=name: come_and_go(f"acme/{n}")) for name in "abc"]
    assert [exit_code(child) for child in children] == [0, 0, 0]
    assert_whole(root)
    store = Store(root)
    assert store.list().versions == ()
    store.close()
