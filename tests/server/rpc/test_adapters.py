"""AdapterService over a real connection to a real store and engine."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from manylora_testing.adapters import tiny_lora
from manylora_testing.models import tiny_model
from manylora_testing.served import Served, eventually
from manylora_testing.served_fixtures import LIMITS
from manylora_testing.stubs import (
    Stubs,
    chunk,
    explain,
    refusal,
    refused_field,
    text_request,
    upload,
)

from manylora.server.rpc.adapters import MAX_UPLOADS
from manylora.v1 import adapters_pb2 as pb

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def load(stubs: Stubs, name: str, **values: Any) -> pb.Residency:
    residency: pb.Residency = stubs.adapters.LoadAdapter(pb.LoadAdapterRequest(name=name, **values))
    return residency


def get(stubs: Stubs, name: str) -> pb.AdapterVersion:
    version: pb.AdapterVersion = stubs.adapters.GetAdapter(pb.GetAdapterRequest(name=name))
    return version


def names(stubs: Stubs, parent: str, size: int = 0) -> list[str]:
    """All pages of a list, each checked to be no longer than asked for."""
    found: list[str] = []
    token = ""
    while True:
        page = stubs.adapters.ListAdapters(
            pb.ListAdaptersRequest(parent=parent, page_size=size, page_token=token)
        )
        assert not size or len(page.adapters) <= size
        found += [version.name for version in page.adapters]
        token = page.next_page_token
        if not token:
            return found


def kept(server: Served) -> tuple[int, int]:
    """How many checkpoints and how many unfinished uploads the store's directory has."""
    root = server.root
    return len(list(root.glob("objects/*/*"))), len(list(root.glob("staging/*")))


def header(tenant: str, adapter_id: str = "a", *aliases: str) -> pb.PublishAdapterRequest:
    return pb.PublishAdapterRequest(
        header=pb.PublishHeader(parent=f"tenants/{tenant}", adapter_id=adapter_id, aliases=aliases)
    )


def test_publish_and_get(stubs: Stubs, tenant: str, adapter_dirs: list[Path]) -> None:
    first = stubs.publish(f"tenants/{tenant}", "tickets", adapter_dirs[0], "prod", "canary")
    name = f"tenants/{tenant}/adapters/tickets"
    assert first.name == f"{name}/versions/1"
    assert first.reference == f"{tenant}/tickets@1"
    assert (first.version, first.peft_type, first.rank) == (1, "LORA", 2)
    assert list(first.aliases) == ["canary", "prod"]
    assert first.size_bytes == sum(
        (adapter_dirs[0] / file).stat().st_size for file in (CONFIG, WEIGHTS)
    )
    assert len(first.digest) == 64 and first.create_time.seconds > 0
    second = stubs.publish(f"tenants/{tenant}", "tickets", adapter_dirs[1], "prod")
    assert second.version == 2 and list(second.aliases) == ["prod"]
    for suffix, version in {
        "": 2,
        "/versions/latest": 2,
        "/versions/2": 2,
        "/versions/prod": 2,
        "/versions/1": 1,
        "/versions/canary": 1,
    }.items():
        assert get(stubs, name + suffix).version == version
    again = stubs.publish(f"tenants/{tenant}", "tickets", adapter_dirs[1])
    assert (again.version, again.digest) == (2, second.digest)


def test_import_is_like_publish(stubs: Stubs, tenant: str, adapter_dirs: list[Path]) -> None:
    published = stubs.publish(f"tenants/{tenant}", "uploaded", adapter_dirs[0])
    imported = stubs.adapters.ImportAdapter(
        pb.ImportAdapterRequest(
            parent=f"tenants/{tenant}",
            adapter_id="imported",
            path=str(adapter_dirs[0]),
            aliases=["prod"],
        )
    )
    assert imported.name == f"tenants/{tenant}/adapters/imported/versions/1"
    assert imported.digest == published.digest
    assert list(imported.aliases) == ["prod"]


def test_imports_that_are_refused(
    stubs: Stubs, tenant: str, adapter_dirs: list[Path], server: Served, tmp_path: Path
) -> None:
    root = adapter_dirs[0].parent
    shutil.copytree(adapter_dirs[0], tmp_path / "outside")
    (root / "link").symlink_to(tmp_path / "outside")
    before = kept(server)
    cases = {
        "": "INVALID_ARGUMENT",
        "relative": "INVALID_ARGUMENT",
        f"{root}/../outside": "INVALID_ARGUMENT",
        f"{root}/link": "INVALID_ARGUMENT",
        "x" * 10_240: "INVALID_ARGUMENT",
        f"{root}/nul\0": "INVALID_ARGUMENT",
        str(tmp_path / "outside"): "PERMISSION_DENIED",
        "/etc": "PERMISSION_DENIED",
        f"{root}/none": "NOT_FOUND",
    }
    for path, code in cases.items():
        request = pb.ImportAdapterRequest(parent=f"tenants/{tenant}", adapter_id="a", path=path)
        assert refused_field(lambda: stubs.adapters.ImportAdapter(request), code) == "path"  # noqa: B023
    assert kept(server) == before
    assert names(stubs, f"tenants/{tenant}") == []


def test_list_pages(stubs: Stubs, tenant: str, adapter_dirs: list[Path]) -> None:
    parent = f"tenants/{tenant}"
    for i in range(5):
        stubs.publish(parent, f"a{i}", adapter_dirs[0])
    for directory in adapter_dirs[1:]:
        stubs.publish(parent, "a2", directory)
    newest = [f"{parent}/adapters/a{i}/versions/{3 if i == 2 else 1}" for i in range(5)]
    versions = [f"{parent}/adapters/a2/versions/{version}" for version in (3, 2, 1)]
    for size in (0, 1, 2, 5, 10_000):
        assert names(stubs, parent, size) == newest
        assert names(stubs, f"{parent}/adapters/a2", size) == versions
    for everyone in ("", "tenants/-"):
        listed = names(stubs, everyone, 3)
        assert [name for name in listed if name.startswith(f"{parent}/")] == newest
        assert listed == sorted(set(listed))
    assert names(stubs, "tenants/nobody") == []


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.ListAdaptersRequest(parent="acme"), "parent"),
        (pb.ListAdaptersRequest(parent="tenants/"), "parent"),
        (pb.ListAdaptersRequest(parent="tenants/..", page_size=1), "parent"),
        (pb.ListAdaptersRequest(parent="tenants/" + "x" * 10_240), "parent"),
        (pb.ListAdaptersRequest(parent="tenants/acme/adapters/.."), "parent"),
        (pb.ListAdaptersRequest(parent="tenants/acme/adapters/a/b"), "parent"),
        (pb.ListAdaptersRequest(parent="tenants/-/adapters/a"), "parent"),
        (pb.ListAdaptersRequest(page_size=-1), "page_size"),
        (pb.ListAdaptersRequest(parent="tenants/acme/adapters/a", page_size=-1), "page_size"),
        (pb.ListAdaptersRequest(page_token="x"), "page_token"),
        (pb.ListAdaptersRequest(page_token="x" * 10_240), "page_token"),
        (pb.ListAdaptersRequest(parent="tenants/a/adapters/a", page_token="x"), "page_token"),
        (
            pb.ListAdaptersRequest(parent="tenants/a/adapters/a", page_token="9" * 9999),
            "page_token",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else ascii(str(value))[:60],
)
def test_bad_lists(stubs: Stubs, request_: pb.ListAdaptersRequest, field: str) -> None:
    found = refused_field(lambda: stubs.adapters.ListAdapters(request_))
    assert found.partition(" ")[0] == field


BAD_NAMES = [
    "",
    "..",
    ".x",
    "a/b",
    "a b",
    "A",
    "ä",
    "а",
    "a\u200b",
    "a\n",
    "-a",
    "x" * 64,
    "x" * 10_240,
]


@pytest.mark.parametrize("bad", BAD_NAMES, ids=ascii)
def test_bad_names(stubs: Stubs, adapter_dirs: list[Path], server: Served, bad: str) -> None:
    before = kept(server)
    directory = adapter_dirs[0]

    def publish(parent: str, adapter_id: str, *aliases: str) -> str:
        messages = upload(parent, adapter_id, directory, *aliases)
        request = pb.ImportAdapterRequest(
            parent=parent, adapter_id=adapter_id, path=str(directory), aliases=aliases
        )
        field = refused_field(lambda: stubs.adapters.PublishAdapter(messages))
        assert field == f"header.{refused_field(lambda: stubs.adapters.ImportAdapter(request))}"
        return field

    assert publish(f"tenants/{bad}", "a") == "header.parent"
    assert publish(bad, "a") == "header.parent"
    assert publish("tenants/t", bad) == "header.adapter_id"
    assert publish("tenants/t", "a", "ok", bad) == "header.aliases[1]"
    assert publish("tenants/t", "a", "latest") == "header.aliases[0]"
    for name in (bad, f"tenants/{bad}/adapters/a", f"tenants/t/adapters/{bad}"):
        for call, request in (
            (stubs.adapters.GetAdapter, pb.GetAdapterRequest(name=name)),
            (stubs.adapters.DeleteAdapter, pb.DeleteAdapterRequest(name=name)),
            (stubs.adapters.LoadAdapter, pb.LoadAdapterRequest(name=name)),
            (stubs.adapters.UnloadAdapter, pb.UnloadAdapterRequest(name=name)),
        ):
            assert refused_field(lambda: call(request)).partition(" ")[0] == "name"  # noqa: B023
    assert kept(server) == before


def test_a_tenants_uploads_at_once(stubs: Stubs, tenant: str, adapter_dirs: list[Path]) -> None:
    """Are bounded, and leave others room."""
    ended = threading.Event()

    def stalled() -> Iterator[pb.PublishAdapterRequest]:
        yield header(tenant)
        ended.wait(60)

    def refused() -> bool:
        call = stubs.adapters.PublishAdapter.future(iter([header(tenant)]))
        error = call.exception()
        return explain(error)[0] == "RESOURCE_EXHAUSTED"

    calls = [stubs.adapters.PublishAdapter.future(stalled()) for _ in range(MAX_UPLOADS)]
    eventually(refused)
    stubs.publish(f"tenants/{tenant}-other", "a", adapter_dirs[0])
    ended.set()
    for call in calls:
        assert explain(call.exception())[0] == "INVALID_ARGUMENT"  # nothing came
    stubs.publish(f"tenants/{tenant}", "a", adapter_dirs[0])


def test_bad_uploads(stubs: Stubs, tenant: str, adapter_dirs: list[Path], server: Served) -> None:
    config = (adapter_dirs[0] / CONFIG).read_bytes()
    weights = (adapter_dirs[0] / WEIGHTS).read_bytes()
    nan = weights[:-4] + b"\x00\x00\xc0\x7f"
    unknown = json.dumps({**json.loads(config), "peft_type": "WIZARDRY"}).encode()
    head, good = header(tenant), [chunk(CONFIG, config), chunk(WEIGHTS, weights)]
    cases: list[tuple[list[pb.PublishAdapterRequest], str, str]] = [
        ([], "INVALID_ARGUMENT", "header"),
        (good, "INVALID_ARGUMENT", "header"),
        ([pb.PublishAdapterRequest()], "INVALID_ARGUMENT", "header"),
        ([head], "INVALID_ARGUMENT", CONFIG),
        ([head, head, *good], "INVALID_ARGUMENT", "chunk"),
        ([head, pb.PublishAdapterRequest(), *good], "INVALID_ARGUMENT", "chunk"),
        ([head, good[0]], "INVALID_ARGUMENT", WEIGHTS),
        ([head, good[0], chunk(WEIGHTS, weights[:-1])], "INVALID_ARGUMENT", WEIGHTS),
        ([head, good[0], chunk(WEIGHTS, weights + b"x")], "INVALID_ARGUMENT", WEIGHTS),
        ([head, good[0], chunk(WEIGHTS, b"\xff" * 64)], "INVALID_ARGUMENT", WEIGHTS),
        ([head, good[0], chunk(WEIGHTS, b"\x80\x04K\x01.")], "INVALID_ARGUMENT", WEIGHTS),
        ([head, good[0], chunk(WEIGHTS, nan)], "INVALID_ARGUMENT", WEIGHTS),
        ([head, chunk(CONFIG, b"{"), good[1]], "INVALID_ARGUMENT", CONFIG),
        ([head, chunk(CONFIG, unknown), good[1]], "FAILED_PRECONDITION", CONFIG),
        ([head, *good, chunk("../evil", b"x")], "INVALID_ARGUMENT", "path"),
        ([head, *good, chunk("", b"x")], "INVALID_ARGUMENT", "path"),
        ([head, *good, chunk("x" * 10_240 + "/", b"x")], "INVALID_ARGUMENT", "path"),
        (
            [head, *good, chunk("adapter_model.bin", b"x")],
            "INVALID_ARGUMENT",
            "'adapter_model.bin'",
        ),
        (
            [head, chunk(CONFIG, b" " * (LIMITS.max_config_bytes + 1))],
            "INVALID_ARGUMENT",
            CONFIG,
        ),
        (
            [head, good[0], *[chunk(WEIGHTS, b"\0" * (1 << 19))] * 3],
            "INVALID_ARGUMENT",
            WEIGHTS,
        ),
    ]
    before = kept(server)
    for messages, code, field in cases:
        found = refused_field(lambda: stubs.adapters.PublishAdapter(iter(messages)), code)  # noqa: B023
        assert found.partition(":")[0] == field
    assert kept(server) == before
    assert names(stubs, f"tenants/{tenant}") == []


def test_a_message_over_the_limit(stubs: Stubs, tenant: str, server: Served) -> None:
    before = kept(server)
    messages = [header(tenant), chunk(WEIGHTS, b"\0" * (5 << 20))]
    code, _ = refusal(lambda: stubs.adapters.PublishAdapter(iter(messages)))
    assert code == "RESOURCE_EXHAUSTED"
    eventually(lambda: kept(server) == before)


def test_an_adapter_of_another_base(
    stubs: Stubs, tenant: str, server: Served, tmp_path: Path
) -> None:
    other = tiny_model("llama", tmp_path / "base", hidden_size=64)
    wider = tiny_lora(other, tmp_path / "adapter", r=2, alpha=2, targets=["q_proj"], seed=0)
    before = kept(server)
    code, details = refusal(lambda: stubs.publish(f"tenants/{tenant}", "a", wider))
    assert code == "FAILED_PRECONDITION"
    metadata = details["ErrorInfo"].metadata
    assert "q_proj" in metadata["field"]
    assert "64" in metadata["found"] and "48" in metadata["wanted"]
    assert details["PreconditionFailure"].violations[0].subject == metadata["field"]
    assert kept(server) == before
    assert names(stubs, f"tenants/{tenant}") == []


def test_two_dozen_clients_publish_one_name(
    stubs: Stubs, tenant: str, adapter_dirs: list[Path]
) -> None:
    """More at once than the server has threads for blocking work."""
    parent = f"tenants/{tenant}"
    with ThreadPoolExecutor(24) as pool:
        same = list(pool.map(lambda _: stubs.publish(parent, "same", adapter_dirs[0]), range(24)))
    assert {version.version for version in same} == {1}
    config = (adapter_dirs[0] / CONFIG).read_bytes()
    weights = (adapter_dirs[0] / WEIGHTS).read_bytes()

    def publish(i: int) -> pb.AdapterVersion:
        messages = [
            header(tenant, "differing", "prod"),
            chunk(CONFIG, config + b"\n" * i),
            chunk(WEIGHTS, weights),
        ]
        version: pb.AdapterVersion = stubs.adapters.PublishAdapter(iter(messages))
        return version

    with ThreadPoolExecutor(24) as pool:
        published = list(pool.map(publish, range(24)))
    assert sorted(version.version for version in published) == list(range(1, 25))
    name = f"{parent}/adapters/differing"
    for version in published:
        assert get(stubs, version.name).digest == version.digest
    stored = [get(stubs, f"{name}/versions/{i}") for i in range(1, 25)]
    assert [list(version.aliases) for version in stored] == [[]] * 23 + [["prod"]]


def test_load_pin_unload(stubs: Stubs, tenant: str, adapter_dirs: list[Path]) -> None:
    version = stubs.publish(f"tenants/{tenant}", "a", adapter_dirs[0], "prod")
    assert not version.HasField("residency")
    name = f"tenants/{tenant}/adapters/a"
    unload = pb.UnloadAdapterRequest(name=name)
    assert refusal(lambda: stubs.adapters.UnloadAdapter(unload))[0] == "NOT_FOUND"
    residency = load(stubs, f"{name}/versions/prod", pin=True)
    assert residency.name == version.name and residency.digest == version.digest
    assert residency.state == pb.RESIDENCY_STATE_RESIDENT
    assert residency.pinned and residency.size_bytes > 0 and residency.in_use == 0
    assert residency.load_duration.ToNanoseconds() > 0
    assert get(stubs, name).residency == residency
    assert not load(stubs, name).pinned
    assert load(stubs, name, pin=True).pinned
    stubs.adapters.UnloadAdapter(unload)
    assert not get(stubs, name).HasField("residency")
    missing = f"tenants/{tenant}/adapters/none"
    for call, request in (
        (stubs.adapters.GetAdapter, pb.GetAdapterRequest(name=missing)),
        (stubs.adapters.LoadAdapter, pb.LoadAdapterRequest(name=missing)),
        (stubs.adapters.UnloadAdapter, pb.UnloadAdapterRequest(name=missing)),
        (stubs.adapters.DeleteAdapter, pb.DeleteAdapterRequest(name=missing)),
        (stubs.adapters.ListAdapters, pb.ListAdaptersRequest(parent=missing)),
    ):
        code, details = refusal(lambda: call(request))  # noqa: B023
        assert code == "NOT_FOUND" and details["ResourceInfo"].resource_name == f"{tenant}/none"


def test_unload_is_refused_while_in_use(
    stubs: Stubs, tenant: str, adapter_dirs: list[Path], server: Served
) -> None:
    stubs.publish(f"tenants/{tenant}", "a", adapter_dirs[0])
    name = f"tenants/{tenant}/adapters/a"
    stream = stubs.inference.StreamGenerate(
        text_request("hello", f"{tenant}/a", max_tokens=4000, ignore_eos=True)
    )
    next(stream)
    unload = pb.UnloadAdapterRequest(name=name)
    code, details = refusal(lambda: stubs.adapters.UnloadAdapter(unload))
    assert code == "FAILED_PRECONDITION"
    assert "1 running" in details["ErrorInfo"].metadata["found"]
    assert get(stubs, name).residency.in_use == 1
    stream.cancel()
    eventually(lambda: server.idle)
    stubs.adapters.UnloadAdapter(unload)


def test_delete_lets_running_requests_finish(
    stubs: Stubs, tenant: str, adapter_dirs: list[Path], server: Served
) -> None:
    version = stubs.publish(f"tenants/{tenant}", "a", adapter_dirs[0])
    name = f"tenants/{tenant}/adapters/a"
    load(stubs, name, pin=True)
    request = text_request("hello", f"{tenant}/a", max_tokens=300, ignore_eos=True)
    before = stubs.inference.Generate(request)
    stream = stubs.inference.StreamGenerate(request)
    parts = [next(stream)]
    stubs.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name=name))
    assert refusal(lambda: stubs.inference.Generate(request))[0] == "NOT_FOUND"
    assert refusal(lambda: get(stubs, name))[0] == "NOT_FOUND"
    parts += stream
    assert "".join(part.text for part in parts) == before.text

    eventually(lambda: version.reference not in resident(server))


def test_delete_takes_an_idle_adapter_off_the_device(
    stubs: Stubs, tenant: str, adapter_dirs: list[Path], server: Served
) -> None:
    for name in ("a", "b"):
        stubs.publish(f"tenants/{tenant}", name, adapter_dirs[0])
        load(stubs, f"tenants/{tenant}/adapters/{name}", pin=True)
    assert {f"{tenant}/a@1", f"{tenant}/b@1"} <= resident(server)
    stubs.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name=f"tenants/{tenant}/adapters/a"))
    assert f"{tenant}/a@1" not in resident(server)
    assert f"{tenant}/b@1" in resident(server), "of the same bytes, but not deleted"
    stubs.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name=f"tenants/{tenant}/adapters/b"))
    assert f"{tenant}/b@1" not in resident(server)


def test_delete_one_version(stubs: Stubs, tenant: str, adapter_dirs: list[Path]) -> None:
    parent = f"tenants/{tenant}"
    for directory in adapter_dirs:
        stubs.publish(parent, "a", directory)
    stubs.publish(parent, "a", adapter_dirs[2], "prod")
    name = f"{parent}/adapters/a"

    def delete(version: str) -> None:
        stubs.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name=f"{name}/versions/{version}"))

    delete("2")
    assert names(stubs, name) == [f"{name}/versions/3", f"{name}/versions/1"]
    assert refusal(lambda: delete("3"))[0] == "FAILED_PRECONDITION"
    for alias in ("prod", "latest"):
        assert refused_field(lambda: delete(alias)) == "name"  # noqa: B023
    assert names(stubs, name) == [f"{name}/versions/3", f"{name}/versions/1"]


def test_tenants_with_the_same_bytes_do_not_see_each_other(
    stubs: Stubs, tenant: str, adapter_dirs: list[Path]
) -> None:
    """Nor does what one does with its adapter happen to the other's."""
    parents = [f"tenants/{owner}{tenant}" for owner in "xy"]
    one, other = (f"{parent}/adapters/a" for parent in parents)
    for parent in parents:
        stubs.publish(parent, "a", adapter_dirs[0])
    load(stubs, one, pin=True)
    assert not get(stubs, other).HasField("residency")
    assert load(stubs, other).name == f"{other}/versions/1"
    watch = stubs.adapters.WatchAdapters(pb.WatchAdaptersRequest(parent=parents[1]))
    seen = [next(watch)]
    stubs.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name=other))
    seen.append(next(watch))
    watch.cancel()
    states = [pb.RESIDENCY_STATE_RESIDENT, pb.RESIDENCY_STATE_EVICTED]
    assert [(e.name, e.state) for e in seen] == [(f"{other}/versions/1", s) for s in states]
    page = stubs.adapters.ListAdapters(pb.ListAdaptersRequest(parent=parents[1]))
    assert parents[0] not in str(page)
    residency = get(stubs, one).residency
    assert residency.state == pb.RESIDENCY_STATE_RESIDENT and residency.pinned
    load(stubs, one, pin=False)


def test_watch(stubs: Stubs, tenant: str, adapter_dirs: list[Path]) -> None:
    stubs.publish(f"tenants/{tenant}", "old", adapter_dirs[0])
    stubs.publish(f"tenants/{tenant}", "new", adapter_dirs[1])
    old, new = (f"tenants/{tenant}/adapters/{name}" for name in ("old", "new"))
    load(stubs, old)
    watch = stubs.adapters.WatchAdapters(pb.WatchAdaptersRequest(parent=f"tenants/{tenant}"))
    everyone = stubs.adapters.WatchAdapters(pb.WatchAdaptersRequest())
    first = next(watch)
    assert (first.name, first.state) == (f"{old}/versions/1", pb.RESIDENCY_STATE_RESIDENT)
    load(stubs, new, pin=True)
    stubs.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name=new))
    wanted = [
        (f"{new}/versions/1", state)
        for state in (
            pb.RESIDENCY_STATE_LOADING,
            pb.RESIDENCY_STATE_RESIDENT,
            pb.RESIDENCY_STATE_EVICTED,
        )
    ]
    assert [(event.name, event.state) for event in islice(watch, len(wanted))] == wanted
    _until(everyone, lambda event: (event.name, event.state) == wanted[-1])
    watch.cancel()
    everyone.cancel()
    bad = pb.WatchAdaptersRequest(parent="tenants/../x")
    assert refused_field(lambda: next(stubs.adapters.WatchAdapters(bad))) == "parent"


def resident(server: Served) -> set[str]:
    return {r.key.label for r in server.run(server.engine.residency())}


def _until(events: Iterator[pb.Residency], wanted: Callable[[pb.Residency], bool]) -> None:
    while not wanted(next(events)):
        pass
