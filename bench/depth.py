"""`python -m bench.depth`: the cost of a page by its depth, for every list of a seeded database."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean, median
from typing import TypeAlias

from daybook.v1.transaction_pb2 import Transaction
from rich.console import Console
from rich.table import Table

from bench.calls import PAGE_SIZE
from bench.lists import List, Sample, lists
from bench.report import machine
from server.book import Book, open_book
from server.ledger.access import ADMIN, Caller
from server.ledger.instants import from_timestamp
from server.ledger.paging import Order, TransactionFilter
from server.seed.load import HOT_ACCOUNT

DEPTHS = (0, 1_000, 1_000_000)
RATIO_MAX = 1.2
PAGES = 10
"""The number of consecutive pages measured at each depth, because a single page may be an outlier."""
ROUNDS = 30
WARM_ROUNDS = 3
_WIDTH = 200


Clock: TypeAlias = Callable[[], float]
"""Returns a time in seconds."""


@dataclass(frozen=True, slots=True)
class Pages:
    """Consecutive pages of a list."""

    depth: int
    """The number of rows before the first page."""
    places: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Costs:
    """The costs of the pages of a list."""

    name: str
    pages: dict[int, tuple[float, ...]]
    """The milliseconds of each page, by the depth of the first page."""

    @property
    def milliseconds(self) -> dict[int, float]:
        """The mean cost of a page, by depth."""
        return {depth: fmean(pages) for depth, pages in self.pages.items()}

    @property
    def ratio(self) -> float:
        """The cost at the most expensive depth, divided by the cost at the top; 1 for a list of one page."""
        first, *others = self.milliseconds.values()
        return max(others, default=first) / first

    @property
    def ratio_of_pages(self) -> float:
        """The cost of the most expensive page, divided by the cost of the first page."""
        first, *others = chain.from_iterable(self.pages.values())
        return max(others, default=first) / first


async def measure(
    book: Book, caller: Caller, only: str, depths: Sequence[int], rounds: int, clock: Clock
) -> list[Costs]:
    """Measures each list whose name contains `only`."""
    sample = await _sample(book, caller)
    console = Console(stderr=True, log_path=False, width=_WIDTH)
    found = []
    for each in lists(book, caller, sample):
        if only in each.name:
            places = await _places(each, depths)
            if places:
                found.append(await _measure(each, places, rounds, clock))
            console.log(
                _summary(found[-1]) if places else f"{each.name} has no full page", markup=False, highlight=False
            )
    return found


async def _measure(listed: List, places: Sequence[Pages], rounds: int, clock: Clock) -> Costs:
    times: dict[tuple[int, str], list[float]] = {}
    for turn in range(WARM_ROUNDS + rounds):
        # All depths are measured in turns, so that a slow phase of the machine affects all of them.
        for number in range(PAGES):
            for pages in places:
                if number < len(pages.places):
                    began = clock()
                    answer = await listed.call(pages.places[number], PAGE_SIZE)
                    took = clock() - began
                    rows, _ = listed.read(answer)
                    if rows != PAGE_SIZE:
                        raise ValueError(f"{listed.name}: a page of {rows} rows")
                    if turn >= WARM_ROUNDS:
                        times.setdefault((pages.depth, pages.places[number]), []).append(1000 * took)
    return Costs(
        listed.name,
        {pages.depth: tuple(median(times[pages.depth, place]) for place in pages.places) for pages in places},
    )


async def _places(listed: List, depths: Sequence[int]) -> list[Pages]:
    """Returns the full pages at these depths.

    A depth beyond the end of the list is replaced by the deepest one in the list.
    """
    if listed.has_offsets:
        total = int(listed.read(await listed.call("", PAGE_SIZE))[1])
        trail = {depth: str(depth) for depth in range(0, total, PAGE_SIZE)}
    else:
        trail, total = await _trail(listed, depths[-1])
    room = max(0, total - PAGES * PAGE_SIZE)
    found = dict.fromkeys(max(each for each in trail if each <= min(depth, room)) for depth in depths)
    places = [Pages(depth, await _pages(listed, depth, trail[depth])) for depth in found]
    return [pages for pages in places if pages.places]


async def _trail(listed: List, depth: int) -> tuple[dict[int, str], int]:
    """Reads down to a depth in pages of the largest size. Returns places by depth, and the number of rows read."""
    place, rows = "", 0
    trail = {0: ""}
    while rows < depth + PAGES * PAGE_SIZE:
        left = depth - rows if rows < depth else listed.page_size_max
        count, place = listed.read(await listed.call(place, min(left, listed.page_size_max)))
        rows += count
        if not place:
            break
        trail[rows] = place
    return trail, rows


async def _pages(listed: List, depth: int, place: str) -> tuple[str, ...]:
    """Returns the places of at most PAGES consecutive full pages."""
    pages = []
    for number in range(PAGES):
        rows, behind = listed.read(await listed.call(place, PAGE_SIZE))
        if rows == PAGE_SIZE:
            pages.append(place)
        place = str(depth + (number + 1) * PAGE_SIZE) if listed.has_offsets else behind
        if not place:
            break
    return tuple(pages)


async def _sample(book: Book, caller: Caller) -> Sample:
    """Returns labels of the account with the most rows, and the time range of its rows."""

    async def rows(order: Order) -> list[Transaction]:
        page = await book.transactions.list(caller, HOT_ACCOUNT, TransactionFilter(), None, PAGE_SIZE, order)
        return [Transaction.FromString(row.body) for row in page.rows]

    newest, oldest = await rows(Order()), await rows(Order(descending=False))
    # Transactions posted after the seed may have no labels.
    labels = next(each.labels for each in oldest if each.labels)
    return Sample(
        first_time=from_timestamp(oldest[0].create_time),
        last_time=from_timestamp(newest[0].create_time),
        location=labels["location"],
        membership=labels["membership"],
        company=labels["company"],
    )


def as_table(found: Sequence[Costs]) -> Table:
    """Returns a table with a row for each list."""
    table = Table("list", "first page, ms", "deeper", "ms", "much deeper", "ms", "ratio", "page by page", "")
    for each in found:
        (_, first), *others = each.milliseconds.items()
        cells = [cell for depth, cost in others for cell in (f"{depth:,}", f"{cost:.2f}")]
        padded = (cells + 4 * [""])[:4]
        ratios = (f"{each.ratio:.2f}" if others else "", f"{each.ratio_of_pages:.2f}")
        table.add_row(each.name, f"{first:.2f}", *padded, *ratios, "" if each.ratio <= RATIO_MAX else "short")
    return table


def _summary(found: Costs) -> str:
    costs = ", ".join(f"{depth:,}: {cost:.2f} ms" for depth, cost in found.milliseconds.items())
    return f"{found.ratio:.2f} {found.ratio_of_pages:.2f} {found.name} ({costs})"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.depth", description="Measures the cost of a page of every list, by its depth."
    )
    parser.add_argument("--database-url", required=True, help="URL of a database that `daybook seed` has filled")
    parser.add_argument("--tenant", default="seed", help="slug of the seeded tenant; default seed")
    parser.add_argument("--only", default="", help="text that the names of the lists to measure contain")
    parser.add_argument("--depth", type=int, default=DEPTHS[-1], help=f"largest depth, in rows; default {DEPTHS[-1]:,}")
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help=f"number of measurements of each page; default {ROUNDS}"
    )
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="measure the processor time of this process, without PostgreSQL's; for a busy machine",
    )
    parser.add_argument("--out", type=Path, help="file for all values as JSON")
    return parser.parse_args(arguments)


async def _run(options: argparse.Namespace) -> list[Costs]:
    async with open_book(options.database_url) as book:
        number = await book.credentials.tenant_number(options.tenant)
        if number is None:
            raise SystemExit(f"there is no tenant {options.tenant}")
        caller = Caller(number, "", "bench", scopes=frozenset({ADMIN}))
        clock = time.process_time if options.processor_time else time.perf_counter
        return await measure(book, caller, options.only, (*DEPTHS[:-1], options.depth), options.rounds, clock)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints. Returns the exit code: 1 if a ratio exceeds RATIO_MAX."""
    options = _parse(arguments)
    found = asyncio.run(_run(options))
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(as_table(found))
    if options.out:
        options.out.write_text(
            json.dumps({"machine": machine(), "found": [asdict(each) for each in found]}, indent=2) + "\n"
        )
    return 1 if any(each.ratio > RATIO_MAX for each in found) else 0


if __name__ == "__main__":
    sys.exit(main())
