"""Resource names, as AdapterService says them, and the store's text forms of the same."""

from __future__ import annotations

from manylora.adapters_store.names import AdapterRef, check_name
from manylora.errors import InvalidArgument

ANY_TENANT = "-"


def parse_parent(text: str, field: str = "parent") -> str:
    """The tenant of "tenants/acme". Raises InvalidArgument."""
    match text.split("/"):
        case ["tenants", tenant]:
            return check_name(tenant, field)
    raise InvalidArgument("not a parent", field=field, found=ascii(text), wanted="tenants/acme")


def parse_any_parent(text: str) -> str | None:
    """Like parse_parent; None, everyone, for "" and "tenants/-"."""
    return None if text in ("", f"tenants/{ANY_TENANT}") else parse_parent(text)


def parse_name(text: str, field: str = "name") -> str:
    """ "tenants/acme/adapters/tickets[/versions/3]" as "acme/tickets[@3]", and a version that is
    no number as an alias, "acme/tickets:prod". Raises InvalidArgument."""
    match text.split("/"):
        case ["tenants", tenant, "adapters", adapter]:
            reference = f"{tenant}/{adapter}"
        case ["tenants", tenant, "adapters", adapter, "versions", version]:
            reference = f"{tenant}/{adapter}{'@' if version.isdecimal() else ':'}{version}"
        case _:
            raise InvalidArgument(
                "not an adapter's name",
                field=field,
                found=ascii(text),
                wanted="tenants/acme/adapters/tickets or tenants/acme/adapters/tickets/versions/3",
            )
    AdapterRef.parse(reference, field)
    return reference


def format_name(label: str) -> str:
    """The resource name of "tenant/adapter@3"."""
    name, _, version = label.partition("@")
    tenant, _, adapter = name.partition("/")
    return f"tenants/{tenant}/adapters/{adapter}/versions/{version}"
