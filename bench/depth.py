"""`python -m bench.depth`: what a page costs at the top and far down, for every list, in a seeded database."""

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
"""How many pages are measured one after another from each depth on: one alone may be peculiar."""
ROUNDS = 30
WARM_ROUNDS = 3
_WIDTH = 200


Clock: TypeAlias = Callable[[], float]
"""Counts seconds."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where pages of a list begin, each behind the one before."""

    depth: int
    """How many rows come before."""
    pages: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """What a list's pages cost."""

    name: str
    pages: dict[int, tuple[float, ...]]
    """Milliseconds of each page, by how many rows come before the first of them."""

    @property
    def milliseconds(self) -> dict[int, float]:
        """What a page costs on average, by how many rows come before."""
        return {depth: fmean(pages) for depth, pages in self.pages.items()}

    @property
    def ratio(self) -> float:
        """The dearest depth to the first page; 1 for a list of one page."""
        first, *others = self.milliseconds.values()
        return max(others, default=first) / first

    @property
    def ratio_of_pages(self) -> float:
        """The dearest page of all to the very first one."""
        first, *others = chain.from_iterable(self.pages.values())
        return max(others, default=first) / first


async def measure(
    book: Book, caller: Caller, only: str, depths: Sequence[int], rounds: int, clock: Clock
) -> list[Found]:
    """Measures every list whose name has `only` in it, one after the other."""
    sample = await _sample(book, caller)
    console = Console(stderr=True, log_path=False, width=_WIDTH)
    found = []
    for each in lists(book, caller, sample):
        if only in each.name:
            places = await _places(each, depths)
            if places:
                found.append(await _measure(each, places, rounds, clock))
            console.log(_words(found[-1]) if places else f"{each.name} has no full page", markup=False, highlight=False)
    return found


async def _measure(wanted: List, places: Sequence[Place], rounds: int, clock: Clock) -> Found:
    times: dict[tuple[int, str], list[float]] = {}
    for turn in range(WARM_ROUNDS + rounds):
        # In turns, so that what slows the machine down for a while slows all of them.
        for number in range(PAGES):
            for place in places:
                if number < len(place.pages):
                    began = clock()
                    answer = await wanted.ask(place.pages[number], PAGE_SIZE)
                    took = clock() - began
                    rows, _ = wanted.read(answer)
                    if rows != PAGE_SIZE:
                        raise ValueError(f"{wanted.name}: a page of {rows} rows")
                    if turn >= WARM_ROUNDS:
                        times.setdefault((place.depth, place.pages[number]), []).append(1000 * took)
    return Found(
        wanted.name,
        {place.depth: tuple(median(times[place.depth, page]) for page in place.pages) for place in places},
    )


async def _places(wanted: List, depths: Sequence[int]) -> list[Place]:
    """The places at these depths; in the place of those that the list doesn't have, one as deep as it has.

    Only those with a full page.
    """
    if wanted.has_offsets:
        total = int(wanted.read(await wanted.ask("", PAGE_SIZE))[1])
        trail = {depth: str(depth) for depth in range(0, total, PAGE_SIZE)}
    else:
        trail, total = await _trail(wanted, depths[-1])
    room = max(0, total - PAGES * PAGE_SIZE)
    found = dict.fromkeys(max(each for each in trail if each <= min(depth, room)) for depth in depths)
    places = [Place(depth, await _pages(wanted, depth, trail[depth])) for depth in found]
    return [place for place in places if place.pages]


async def _trail(wanted: List, depth: int) -> tuple[dict[int, str], int]:
    """The way down to a depth in pages as large as there are: places by depth, and how many rows were seen."""
    place, rows = "", 0
    trail = {0: ""}
    while rows < depth + PAGES * PAGE_SIZE:
        left = depth - rows if rows < depth else wanted.page_size_max
        count, place = wanted.read(await wanted.ask(place, min(left, wanted.page_size_max)))
        rows += count
        if not place:
            break
        trail[rows] = place
    return trail, rows


async def _pages(wanted: List, depth: int, place: str) -> tuple[str, ...]:
    """Places of full pages behind one another, as many as are measured or as there are."""
    pages = []
    for number in range(PAGES):
        rows, behind = wanted.read(await wanted.ask(place, PAGE_SIZE))
        if rows == PAGE_SIZE:
            pages.append(place)
        place = str(depth + (number + 1) * PAGE_SIZE) if wanted.has_offsets else behind
        if not place:
            break
    return tuple(pages)


async def _sample(book: Book, caller: Caller) -> Sample:
    """Values of a row of the account with the most rows, and from when to when its rows are."""

    async def rows(order: Order) -> list[Transaction]:
        page = await book.transactions.list(caller, HOT_ACCOUNT, TransactionFilter(), None, PAGE_SIZE, order)
        return [Transaction.FromString(row.body) for row in page.rows]

    newest, oldest = await rows(Order()), await rows(Order(descending=False))
    # What was posted after the seed may have none.
    labels = next(each.labels for each in oldest if each.labels)
    return Sample(
        first_time=from_timestamp(oldest[0].create_time),
        last_time=from_timestamp(newest[0].create_time),
        location=labels["location"],
        membership=labels["membership"],
        company=labels["company"],
    )


def as_table(found: Sequence[Found]) -> Table:
    """A row for each list."""
    table = Table("list", "first page, ms", "deeper", "ms", "much deeper", "ms", "ratio", "page by page", "")
    for each in found:
        (_, first), *others = each.milliseconds.items()
        cells = [cell for depth, cost in others for cell in (f"{depth:,}", f"{cost:.2f}")]
        padded = (cells + 4 * [""])[:4]
        ratios = (f"{each.ratio:.2f}" if others else "", f"{each.ratio_of_pages:.2f}")
        table.add_row(each.name, f"{first:.2f}", *padded, *ratios, "" if each.ratio <= RATIO_MAX else "short")
    return table


def _words(found: Found) -> str:
    costs = ", ".join(f"{depth:,}: {cost:.2f} ms" for depth, cost in found.milliseconds.items())
    return f"{found.ratio:.2f} {found.ratio_of_pages:.2f} {found.name} ({costs})"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.depth", description="Measures pages of every list, at the top and far down."
    )
    parser.add_argument("--database-url", required=True, help="a database that `daybook seed` has filled")
    parser.add_argument("--tenant", default="seed", help="the slug of the seeded tenant; seed unless given")
    parser.add_argument("--only", default="", help="a part of the names of the lists to measure")
    parser.add_argument("--depth", type=int, default=DEPTHS[-1], help=f"the largest; {DEPTHS[-1]:,} unless given")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"how often; {ROUNDS} unless given")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count what this process takes of a processor, for a busy machine; says nothing of PostgreSQL",
    )
    parser.add_argument("--out", type=Path, help="a file for all of it as JSON")
    return parser.parse_args(arguments)


async def _run(options: argparse.Namespace) -> list[Found]:
    async with open_book(options.database_url) as book:
        number = await book.credentials.tenant_number(options.tenant)
        if number is None:
            raise SystemExit(f"there is no tenant {options.tenant}")
        caller = Caller(number, "", "bench", scopes=frozenset({ADMIN}))
        clock = time.process_time if options.processor_time else time.perf_counter
        return await measure(book, caller, options.only, (*DEPTHS[:-1], options.depth), options.rounds, clock)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints. Answers with the exit code: 1 if some ratio is too large."""
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
