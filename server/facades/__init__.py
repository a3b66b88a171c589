"""The documented APIs: one module per vendor. It parses, makes one use-case call and renders."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Protocol, cast

from server.ledger.errors import DaybookError
from server.transport.page_tokens import PageTokens
from server.usecases.accounts import Accounts
from server.usecases.transactions import Transactions
from server.usecases.usage import Usage
from server.vendors.vendor import Refusal, Vendor


@dataclass(frozen=True, slots=True)
class Dependencies:
    """The objects that facades use."""

    accounts: Accounts
    transactions: Transactions
    usage: Usage
    page_tokens: PageTokens


class Facade(Protocol):
    """A module of this package."""

    VENDOR: Vendor

    def render_error(self, error: DaybookError) -> Refusal:
        """Renders an error in the vendor's format."""

    def add_to_server(self, server: Any, dependencies: Dependencies) -> None:
        """Adds the facade's servicer to a server, or to an object with a server's methods."""


def all_facades() -> tuple[Facade, ...]:
    """Every facade, ordered by name."""
    names = sorted(each.name for each in iter_modules(__path__))
    return tuple(cast("Facade", import_module(f"{__name__}.{name}")) for name in names)
