"""Resource names, as the AdapterService says them, and what the store calls the same."""

from __future__ import annotations

from manylora.adapters_store.names import AdapterName, AdapterRef, check_name
from manylora.errors import InvalidArgument

ANY_TENANT = "-"


def parse_parent(text: str) -> str:
    """The tenant of "tenants/acme". Raises InvalidArgument."""
    match text.split("/"):
        case ["tenants", tenant]:
            return check_name(tenant, "parent")
    raise InvalidArgument("not a parent", field="parent", found=ascii(text), wanted="tenants/acme")


def parse_name(text: str) -> AdapterRef:
    """What "tenants/acme/adapters/tickets[/versions/3]" stands for. Raises InvalidArgument."""
    match text.split("/"):
        case ["tenants", tenant, "adapters", adapter]:
            return AdapterRef.parse(f"{tenant}/{adapter}", "name")
        case ["tenants", tenant, "adapters", adapter, "versions", version]:
            mark = "@" if version.isdecimal() else ":"
            return AdapterRef.parse(f"{tenant}/{adapter}{mark}{version}", "name")
    raise InvalidArgument(
        "not an adapter's name",
        field="name",
        found=ascii(text),
        wanted="tenants/acme/adapters/tickets or tenants/acme/adapters/tickets/versions/3",
    )


def format_name(name: AdapterName) -> str:
    return f"tenants/{name.tenant}/adapters/{name.adapter}"


def format_version(reference: str) -> str:
    """The resource name of "tenant/adapter@3"."""
    name, _, version = reference.partition("@")
    return f"{format_name(AdapterName.parse(name))}/versions/{version}"
