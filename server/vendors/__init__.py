"""The error format of each documented API: one table per vendor.

Both the facade and the gateway render their errors by the table.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from server.vendors.vendor import Vendor


def all_vendors() -> tuple[Vendor, ...]:
    """The table of every vendor, ordered by name."""
    names = sorted(each.name for each in iter_modules(__path__) if each.name != "vendor")
    return tuple(import_module(f"{__name__}.{name}").VENDOR for name in names)
