"""A reader for each vendor's API: one module per vendor, with a `READER`."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from server.importing.found import Reader


def vendors() -> tuple[str, ...]:
    """The names of all readers, in order."""
    return tuple(sorted(each.name for each in iter_modules(__path__)))


def reader(vendor: str) -> Reader:
    """The reader of a vendor. Raises ValueError if there is none."""
    if vendor not in vendors():
        raise ValueError(f"there is no reader {vendor!r}: choose one of {', '.join(vendors())}")
    found: Reader = import_module(f"{__name__}.{vendor}").READER
    return found
