from __future__ import annotations

import pytest

from manylora.adapters_store.names import AdapterName, AdapterRef, check_alias
from manylora.errors import InvalidArgument

GOOD = ["a", "0", "acme", "a-b_c.d", "9lives", "a" * 63, "a.", "a-"]
BAD = [
    "",
    ".",
    "..",
    "a..b",
    ".hidden",
    "-a",
    "_a",
    "A",
    "acme\n",
    "a b",
    "a\0",
    "a" * 64,
    "a" * 10_240,
    "аcme",  # a Cyrillic а
    "acmé",
    "a\u202eb",
    "ａ",  # fullwidth
    "٣",  # an Arabic digit
    "ſ",  # folds to s
    "a%2e%2e",
    "a\\b",
    "~",
]


@pytest.mark.parametrize("name", GOOD)
def test_good_names(name: str) -> None:
    assert AdapterName.parse(f"{name}/{name}") == AdapterName(name, name)
    assert str(AdapterName(name, name)) == f"{name}/{name}"


@pytest.mark.parametrize("name", BAD)
def test_bad_names(name: str) -> None:
    for text, field in ((f"{name}/good", "name (tenant)"), (f"good/{name}", "name")):
        with pytest.raises(InvalidArgument) as caught:
            AdapterName.parse(text)
        assert caught.value.field == field
        assert str(caught.value).isascii() or "…" in str(caught.value)
        assert len(str(caught.value)) < 500
    with pytest.raises(InvalidArgument):
        check_alias(name)


@pytest.mark.parametrize("text", ["", "acme", "/", "a/", "/a", "a/b/c", "../a", "a/../b", "a//b"])
def test_names_have_two_parts(text: str) -> None:
    with pytest.raises(InvalidArgument):
        AdapterName.parse(text)


def test_references() -> None:
    name = AdapterName("acme", "tickets")
    assert AdapterRef.parse("acme/tickets") == AdapterRef(name)
    assert AdapterRef.parse("acme/tickets@12") == AdapterRef(name, version=12)
    assert AdapterRef.parse("acme/tickets:prod") == AdapterRef(name, alias="prod")
    assert AdapterRef.parse("acme/tickets:latest") == AdapterRef(name)


@pytest.mark.parametrize(
    "suffix",
    [
        "@",
        "@0",
        "@-1",
        "@01",
        "@1.5",
        "@٣",
        "@1@2",
        "@1:prod",
        "@" + "9" * 30,
        ":",
        ":Prod",
        ":a:b",
    ],
)
def test_bad_references(suffix: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        AdapterRef.parse(f"acme/tickets{suffix}")
    assert caught.value.field.startswith("adapter")


@pytest.mark.parametrize("alias", ["latest", "7", "123"])
def test_what_would_be_read_as_a_version_is_no_alias(alias: str) -> None:
    with pytest.raises(InvalidArgument, match="not an alias"):
        check_alias(alias)
