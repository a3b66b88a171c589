"""Posts a planned import: creates its accounts, and then imports its items in parts."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice

from daybook_client import Daybook, PastTransaction
from daybook_client.errors import (
    AccountExists,
    Cancelled,
    DaybookError,
    DeadlineExceeded,
    RequestIdReused,
    ResourceExhausted,
    Unavailable,
)
from server.importing.plan import ImportRefused, Plan

PART_ITEMS = 10_000
"""The number of items of a call. Only an interrupted call is repeated."""
CHANGED_MAX = 1000
"""The number of changed rows after which an import ends."""
ATTEMPTS = 8
LONGEST_DELAY_SECONDS = 30.0


@dataclass(slots=True)
class Posted:
    """The outcome of an import."""

    imported_count: int = 0
    skipped_count: int = 0
    """The number of items that were already imported."""
    changed: list[str] = field(default_factory=list)
    """The request_ids of rows that were imported, and that the source now shows in another way."""


def create_accounts(plan: Plan, client: Daybook) -> int:
    """Creates the accounts that the ledger lacks, in the order of their first rows. Returns their number."""
    count = 0
    for account in plan.accounts.values():
        new = account.new
        if account.exists or new is None:
            continue
        try:
            client.create_account(
                new.id,
                new.kind,
                display_name=new.display_name,
                user=new.user,
                company=new.company,
                hour_anchor_time=new.hour_anchor_time,
            )
        except AccountExists:
            # Another import has just created it.
            continue
        count += 1
    return count


def post(
    plan: Plan,
    items: Iterable[PastTransaction],
    client: Daybook,
    report: Callable[[int], None],
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> Posted:
    """Imports the items of a plan in their order. Calls `report` with the number of items after each part.

    Raises ImportRefused for the first item that is refused, or if too many rows have changed; the items before it stay
    imported.
    """
    posted = Posted()
    iterator = iter(items)
    while part := list(islice(iterator, PART_ITEMS)):
        _post_part(plan, part, client, posted, sleep)
        report(len(part))
    return posted


def _post_part(
    plan: Plan, part: list[PastTransaction], client: Daybook, posted: Posted, sleep: Callable[[float], None]
) -> None:
    attempt, size = 0, len(part)
    while part:
        try:
            outcome = client.import_transactions(part[:size])
        except RequestIdReused as error:
            # The items before this one are imported; the source now shows this one in another way.
            index = int(error.metadata["index"])
            posted.changed.append(part[index].request_id)
            new_count = sum(plan.accounts[each.account].is_new(each) for each in part[:index])
            posted.imported_count += new_count
            posted.skipped_count += index - new_count
            if len(posted.changed) == CHANGED_MAX:
                raise ImportRefused(
                    f"{CHANGED_MAX} rows, the first of them {posted.changed[0]}, differ from imported rows with their "
                    "request_ids: import the same source in the same way as before"
                ) from error
            part = part[index + 1 :]
            # Changed rows often follow each other, and each ends its call.
            size = 1
        except (Unavailable, ResourceExhausted, DeadlineExceeded, Cancelled) as error:
            attempt += 1
            if attempt == ATTEMPTS:
                raise
            asked = error.retry_delay.total_seconds() if error.retry_delay else 0.0
            sleep(asked + min(LONGEST_DELAY_SECONDS, 2.0**attempt / 2) * random.random())  # noqa: S311  # jitter
        except DaybookError as error:
            if "index" not in error.metadata:
                raise
            refused = part[int(error.metadata["index"])]
            raise ImportRefused(
                f"{refused.request_id} of {refused.account} at {refused.create_time.isoformat()}: {error}; "
                "the rows before it are imported"
            ) from error
        else:
            posted.imported_count += outcome.imported_count
            posted.skipped_count += outcome.skipped_count
            part = part[size:]
            attempt, size = 0, size * 2
