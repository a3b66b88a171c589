"""The report of an import, as text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal

from daybook_client import PastTransaction, TransactionState
from server.importing.found import Difference, Kept, Problem, shown
from server.importing.plan import Plan
from server.ledger.instants import from_datetime, write

SHOWN_COUNT = 20
"""The number of accounts, problems and differences that a report shows."""


@dataclass(slots=True)
class Totals:
    """Counts and sums of items, by kind, category and state."""

    counts: dict[tuple[str, str, str], int] = field(default_factory=lambda: defaultdict(int))
    sums: dict[tuple[str, str, str], Decimal] = field(default_factory=lambda: defaultdict(Decimal))
    first: datetime | None = None
    last: datetime | None = None

    def tap(self, items: Iterable[PastTransaction]) -> Iterator[PastTransaction]:
        """Yields the items, and adds each to the totals."""
        for item in items:
            transaction = item.transaction
            key = (transaction.kind.value, transaction.category, transaction.state.value)
            self.counts[key] += 1
            self.sums[key] += Decimal(transaction.amount)
            self.first, self.last = self.first or item.create_time, item.create_time
            yield item

    def lines(self) -> Iterator[str]:
        """The totals as a table."""
        if self.first is None or self.last is None:
            yield "No transactions."
            return
        total = sum(
            (amount for (_, _, state), amount in self.sums.items() if state == TransactionState.SUCCEEDED), Decimal(0)
        )
        rows = [("kind", "category", "state", "count", "sum")]
        rows += [(*key, f"{self.counts[key]:,}", shown(self.sums[key])) for key in sorted(self.counts)]
        rows.append(("total", "", "", f"{sum(self.counts.values()):,}", shown(total)))
        widths = [max(len(row[index]) for row in rows) for index in range(5)]
        for row in rows:
            texts = (each.ljust(width) for each, width in zip(row[:3], widths, strict=False))
            numbers = (each.rjust(width) for each, width in zip(row[3:], widths[3:], strict=True))
            yield "  ".join((*texts, *numbers))
        yield f"from {write(from_datetime(self.first))} to {write(from_datetime(self.last))}"


def account_lines(plan: Plan) -> Iterator[str]:
    """The accounts to create, and how many rows of the others are new."""
    missing = [each.new for each in plan.accounts.values() if not each.exists and each.new is not None]
    yield f"{len(missing)} of {len(plan.accounts)} accounts to create"
    for new in missing[:SHOWN_COUNT]:
        yield f"  {new.id}  {new.kind}  {new.display_name}".rstrip()
    if len(missing) > SHOWN_COUNT:
        yield f"  and {len(missing) - SHOWN_COUNT} more"
    present = sum(each.row_count - each.new_count for each in plan.accounts.values())
    if present:
        yield f"{present} rows are not newer than the ledger's transactions: the import skips those that it has"


def kept_lines(title: str, kept: Kept) -> Iterator[str]:
    """Problems or differences, each with its place."""
    if not kept.count:
        return
    yield f"{kept.count} {title}:"
    for each in kept.entries[:SHOWN_COUNT]:
        yield f"  {entry_line(each)}"
    if kept.count > SHOWN_COUNT:
        yield f"  and {kept.count - SHOWN_COUNT} more"


def entry_line(entry: Problem | Difference) -> str:
    """A problem or a difference in one line."""
    return f"{entry.place}: {entry.reason}"
