"""What a reader finds in a source: rows, accounts, balances, and rows that can't be imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple, TypeAlias

from daybook_client import AccountKind, Company, PastTransaction, User
from server.importing.http import Api

KEPT_COUNT = 1000
"""The number of problems, and of differences, that are kept for the report."""


@dataclass(frozen=True, slots=True)
class Row:
    """A transaction to import."""

    past: PastTransaction
    """Its request_id is empty if the source has no id for the row."""
    expiring_amount: Decimal | None = None
    """The part of the amount that moved expiring credits, with its sign; None if the source doesn't show parts."""
    place: str = field(default="", kw_only=True)
    """Where the row is; see Problem."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewAccount:
    """An account to create if the ledger lacks it."""

    id: str
    kind: AccountKind
    display_name: str = ""
    user: User | None = None
    company: Company | None = None
    hour_anchor_time: datetime | None = None


@dataclass(frozen=True, slots=True)
class ShownBalance:
    """The balance that a source shows for an account after all of its rows."""

    account_id: str
    permanent_amount: Decimal
    expiring_amount: Decimal = Decimal(0)


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that can't be imported."""

    place: str
    """Where the row is, such as `page.json, row 3` or `line 7, column Amount`."""
    reason: str


@dataclass(frozen=True, slots=True)
class Difference:
    """A row that is imported, but that Daybook shows in another way than the source."""

    place: str
    reason: str


@dataclass(slots=True)
class Kept:
    """The first of many entries of a report, and their number."""

    entries: list[Problem | Difference] = field(default_factory=list)
    count: int = 0

    def add(self, entry: Problem | Difference) -> None:
        """Adds an entry."""
        self.count += 1
        if len(self.entries) < KEPT_COUNT:
            self.entries.append(entry)


Found: TypeAlias = Row | NewAccount | ShownBalance | Problem | Difference


@dataclass(frozen=True, slots=True)
class Page:
    """A JSON document of a source."""

    place: str
    """A file name or a URL."""
    content: Any
    """The parsed JSON. Numbers with a fraction are Decimal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the caller tells about a source."""

    account_id: str = ""
    """The space of Teable, or the organization of Dreadnode."""
    network: str = ""
    """The network id of Spacebring."""
    since: datetime | None = None
    """Older rows are not imported."""
    now: datetime
    """The end of the history."""
    account_kind: AccountKind = AccountKind.OTHER
    """The kind of missing accounts that the source doesn't describe."""
    expire_time: datetime
    """When the expiring credits expire that are left at the end."""


class Reader(NamedTuple):
    """How to read one vendor's API."""

    vendor: str
    """The vendor's name, for people."""
    address: str
    """The documented base URL; empty if the vendor documents none."""
    headers: Callable[[str, Options], Mapping[str, str]]
    """The headers of each request, made from the token."""
    pages: Callable[[Api, Options], Iterator[Page]]
    """Reads all pages from a live address, as the vendor lists them by default: newest rows first."""
    rows: Callable[[Iterable[Page], Options], Iterator[Found]]
    """Reads the rows of pages, newest first. Raises SourceInvalid for a document that is no page of this API."""
    needs_account: bool = False
    """Whether pages don't name their account, so that the caller must."""


class SourceInvalid(ValueError):
    """A document is not what the reader expects."""


class RowInvalid(ValueError):
    """A row can't be imported. The text is the reason."""


@dataclass(slots=True)
class Seen:
    """The ids that a reader has already met."""

    ids: set[str] = field(default_factory=set)

    def is_new(self, id_: str) -> bool:
        """Whether this is the first call with the id."""
        is_new = id_ not in self.ids
        self.ids.add(id_)
        return is_new


def shown(amount: Decimal) -> str:
    """An amount in its shortest form, with thousands separators, for people."""
    text = f"{amount + 0:,f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def bearer(token: str, _options: Options) -> Mapping[str, str]:
    """The headers of a request with a Bearer token."""
    return {"authorization": f"Bearer {token}"}
