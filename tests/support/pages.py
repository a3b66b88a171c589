"""Addresses of the page in the browser."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from playwright.sync_api import Page

from tests.support.rest import Rest

KEY = "demo-teams.public"
"""The demo's key that the printed address has."""
OpenPage: TypeAlias = Callable[..., Page]
"""Opens an address; a fixture."""


def address(origin: str, route: str = "/", key: str = KEY) -> str:
    """Returns the address that opens the page with a key."""
    return f"{origin}/#key={key}{route}"


def key_of(rest: Rest) -> str:
    """Returns the key of a caller."""
    return rest._credential["authorization"].removeprefix("Bearer ")
