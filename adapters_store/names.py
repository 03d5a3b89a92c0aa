"""Names of adapters, and the text forms that callers use for them.

`tenant/adapter` names an adapter; `tenant/adapter@3` its third version, `tenant/adapter:prod`
the version that the alias `prod` stands for; without a suffix, or as `:latest`, the newest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from manylora.errors import InvalidArgument

LATEST = "latest"

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_WANTED_NAME = "1 to 63 of a-z, 0-9, '.', '_', '-', beginning with a letter or digit, without '..'"


@dataclass(slots=True, frozen=True, order=True)
class AdapterName:
    """A tenant's adapter, whichever version."""

    tenant: str
    adapter: str

    @staticmethod
    def parse(text: str, field: str = "name") -> AdapterName:
        """Reads `tenant/adapter`. Raises InvalidArgument."""
        tenant, slash, adapter = text.partition("/")
        if not slash:
            raise InvalidArgument(
                "an adapter's name has two parts",
                field=field,
                found=ascii(text),
                wanted="tenant/adapter",
            )
        return AdapterName(check_name(tenant, f"{field} (tenant)"), check_name(adapter, field))

    def __str__(self) -> str:
        return f"{self.tenant}/{self.adapter}"


@dataclass(slots=True, frozen=True)
class AdapterRef:
    """What a caller asked for: a version, an alias, or (neither) the newest version."""

    name: AdapterName
    version: int | None = None
    alias: str | None = None

    @staticmethod
    def parse(text: str, field: str = "adapter") -> AdapterRef:
        """Reads `tenant/adapter`, `tenant/adapter@3` or `tenant/adapter:prod`.

        Raises InvalidArgument.
        """
        name, at, version = text.partition("@")
        if at:
            return AdapterRef(
                AdapterName.parse(name, field), version=_parse_version(version, field)
            )
        name, colon, alias = text.partition(":")
        if not colon:
            return AdapterRef(AdapterName.parse(text, field))
        check_name(alias, f"{field} (alias)")
        return AdapterRef(AdapterName.parse(name, field), alias=None if alias == LATEST else alias)


def check_name(text: str, field: str) -> str:
    """Returns text if it may be a tenant's, an adapter's or an alias's name; else raises
    InvalidArgument."""
    if not _NAME.fullmatch(text) or ".." in text:
        raise InvalidArgument("not a name", field=field, found=ascii(text), wanted=_WANTED_NAME)
    return text


def check_alias(text: str, field: str = "alias") -> str:
    """Like check_name; `latest` moves by itself and cannot be set, and an alias of digits alone
    would be taken for a version."""
    if check_name(text, field) == LATEST or text.isdecimal():
        raise InvalidArgument(
            "not an alias",
            field=field,
            found=text,
            wanted=f"a name with a letter in it, other than {LATEST!r}",
        )
    return text


def _parse_version(text: str, field: str) -> int:
    if not _VERSION.fullmatch(text):
        raise InvalidArgument(
            "not a version",
            field=f"{field} (version)",
            found=ascii(text),
            wanted="a positive whole number",
        )
    return int(text)
