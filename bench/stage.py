"""What the figures of one run share: how long they take, and ledgers that are built once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console

from bench import ledger, servers
from bench.ledger import Ledger
from bench.settling import Compared, Rounds, compare

ROWS = 20_000
"""How many transactions the organization of the usual ledger has."""
ROWS_QUICK = 2_000
ROWS_SMALL = 10_000
ROWS_LARGE = 10_000_000
ROWS_LARGE_QUICK = 50_000
DEPTH = 1_000_000
LISTS = 1_000_000
LISTS_QUICK = 5_000

Entered = TypeVar("Entered")


@dataclass
class Stage:
    """Where the figures are taken."""

    folder: Path
    """Where databases lie meanwhile."""
    is_quick: bool = False
    """Whether to look only if everything works: the figures are noise."""
    rows_large: int = ROWS_LARGE
    console: Console = field(default_factory=lambda: Console(stderr=True, log_path=False))
    _stack: ExitStack = field(default_factory=ExitStack)
    _databases: int = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def seconds(self) -> int:
        """How long one side is measured at a time. The generators take whole seconds only."""
        return 1 if self.is_quick else 4

    @property
    def rounds(self) -> Rounds:
        """How often both sides are measured."""
        return Rounds(2, 2) if self.is_quick else Rounds()

    @property
    def rows(self) -> int:
        """How many transactions the organization has."""
        return ROWS_QUICK if self.is_quick else ROWS

    @property
    def lists(self) -> int:
        """How many lists a process has to stand."""
        return LISTS_QUICK if self.is_quick else LISTS

    @property
    def depth(self) -> int:
        """How many rows lie before a page that is deep."""
        return min(DEPTH, self.rows_large // 2)

    def say(self, text: str) -> None:
        """Tells whoever waits how far it is."""
        self.console.log(text, markup=False, highlight=False)

    def compare(self, above: Callable[[], float], below: Callable[[], float]) -> Compared:
        """Both sides in turns, after a turn each that doesn't count."""
        above()
        below()
        compared = compare(above, below, self.rounds)
        self.say(f"{compared.ratio:.3f} after {len(compared.ratios)} rounds, spread {compared.spread:.0%}")
        return compared

    @cached_property
    def sqlite(self) -> Ledger:
        """The usual ledger, in SQLite, with the peer's table."""
        return self._with_peer(self.fresh_sqlite())

    @cached_property
    def postgresql(self) -> Ledger:
        """The usual ledger, in PostgreSQL, with the peer's table."""
        self.say("starting PostgreSQL")
        return self._with_peer(ledger.build(self._enter(servers.postgresql()), self.rows))

    @cached_property
    def large(self) -> Ledger:
        """The large ledger, in SQLite. It takes minutes."""
        return self._seeded(self.rows_large)

    @cached_property
    def small(self) -> Ledger:
        """What the large ledger is compared with."""
        return self._seeded(ROWS_SMALL)

    def _seeded(self, rows: int) -> Ledger:
        self.say(f"seeding a ledger of {rows:,} transactions")
        return ledger.seed(self._new_sqlite_url(), rows)

    def fresh_sqlite(self) -> Ledger:
        """A ledger of its own, for what writes."""
        self.say(f"building a ledger of {self.rows:,} transactions")
        return ledger.build(self._new_sqlite_url(), self.rows)

    def _new_sqlite_url(self) -> str:
        self._databases += 1
        return f"sqlite+aiosqlite:///{self.folder.resolve()}/ledger-{self._databases}.db"

    def _with_peer(self, built: Ledger) -> Ledger:
        # Only here, so that figures without a peer can be taken without its packages.
        from bench import peer  # noqa: PLC0415

        asyncio.run(peer.fill(built.database_url, ledger.ORGANIZATION))
        return built

    def _enter(self, context: AbstractContextManager[Entered]) -> Entered:
        return self._stack.enter_context(context)
