"""The state that the figures of one run share: durations, and ledgers that are built once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console

from bench import ledger, servers
from bench.comparison import Compared, Rounds, compare
from bench.ledger import Ledger, Pool

ROWS = 20_000
"""The number of transactions of ORGANIZATION."""
ROWS_QUICK = 2_000
POOL_SIZE = 1000
"""The number of accounts of each pool."""
POOL_SIZE_QUICK = 20
ROWS_IMPORTED = 100_000
ROWS_IMPORTED_QUICK = 5_000
ROWS_SMALL = 10_000
ROWS_LARGE = 10_000_000
ROWS_LARGE_QUICK = 50_000
DEPTH = 1_000_000
LISTS = 1_000_000
LISTS_QUICK = 5_000

Entered = TypeVar("Entered")


@dataclass
class Stage:
    """The durations and the ledgers of one run."""

    folder: Path
    """The folder for databases, deleted at the end of the run."""
    is_quick: bool = False
    """Whether the run is a short trial, whose figures are noise."""
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
        """The duration of one measurement of one side, in whole seconds, as h2load and wrk need it."""
        return 1 if self.is_quick else 4

    @property
    def seconds_overloaded(self) -> int:
        """The duration of the overload of figure 19."""
        return 8 if self.is_quick else 60

    @property
    def seconds_around(self) -> int:
        """The time before and after the overload of figure 19."""
        return 3 if self.is_quick else 10

    @property
    def rounds(self) -> Rounds:
        """The number of rounds of a comparison."""
        return Rounds(2, 2) if self.is_quick else Rounds()

    @property
    def rows(self) -> int:
        """The number of transactions of ORGANIZATION."""
        return ROWS_QUICK if self.is_quick else ROWS

    @property
    def pool_size(self) -> int:
        """The number of accounts of each pool."""
        return POOL_SIZE_QUICK if self.is_quick else POOL_SIZE

    @property
    def rows_imported(self) -> int:
        """The number of rows of one import of figure 14."""
        return ROWS_IMPORTED_QUICK if self.is_quick else ROWS_IMPORTED

    @property
    def lists(self) -> int:
        """The number of lists during which figure 12 measures memory."""
        return LISTS_QUICK if self.is_quick else LISTS

    @property
    def depth(self) -> int:
        """The number of rows before the deep page of figure 9."""
        return min(DEPTH, self.rows_large // 2)

    def log(self, text: str) -> None:
        """Logs progress to stderr."""
        self.console.log(text, markup=False, highlight=False)

    def compare(self, above: Callable[[], float], below: Callable[[], float]) -> Compared:
        """Compares both sides, after one measurement of each to warm up."""
        above()
        below()
        compared = compare(above, below, self.rounds)
        self.log(f"{compared.ratio:.3f} after {len(compared.ratios)} rounds, spread {compared.spread:.0%}")
        return compared

    @cached_property
    def sqlite(self) -> Ledger:
        """The ledger for reading, in SQLite, with all pools and the peer's table."""
        return self._for_reading(self.new_sqlite_url(), ledger.POOLS)

    @cached_property
    def postgresql(self) -> Ledger:
        """The ledger for reading, in PostgreSQL, with the pool of organizations and the peer's table."""
        self.log("starting PostgreSQL")
        return self._for_reading(self._enter(servers.postgresql()), [ledger.ORGANIZATIONS])

    @cached_property
    def large(self) -> Ledger:
        """The large ledger, in SQLite. Seeding it takes minutes."""
        return self._seeded(self.rows_large)

    @cached_property
    def small(self) -> Ledger:
        """The ledger with which the large one is compared."""
        return self._seeded(ROWS_SMALL)

    def _seeded(self, rows: int) -> Ledger:
        self.log(f"seeding a ledger of {rows:,} transactions")
        return ledger.seed(self.new_sqlite_url(), rows)

    def fresh_sqlite(self) -> Ledger:
        """Builds a new ledger without pools, for a figure that writes."""
        self.log(f"building a ledger of {self.rows:,} transactions")
        return ledger.build(self.new_sqlite_url(), self.rows)

    def new_sqlite_url(self) -> str:
        """Returns the URL of a new database."""
        self._databases += 1
        return f"sqlite+aiosqlite:///{self.folder.resolve()}/ledger-{self._databases}.db"

    def _for_reading(self, database_url: str, pools: Sequence[Pool]) -> Ledger:
        # Imported here, so that figures without the peer can be measured without its packages.
        from bench import peer  # noqa: PLC0415

        self.log(f"building a ledger with {len(pools)} pools of {self.pool_size:,} accounts")
        built = ledger.build(database_url, self.rows, pools, self.pool_size)
        asyncio.run(peer.fill(built.database_url, ledger.ORGANIZATION))
        return built

    def _enter(self, context: AbstractContextManager[Entered]) -> Entered:
        return self._stack.enter_context(context)
