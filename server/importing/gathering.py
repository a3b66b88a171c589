"""Gathers the rows of a source in a spool, each checked by the rules of the ledger before anything is posted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from daybook.v1.account_pb2 import Account
from daybook.v1.admin_service_pb2 import ImportTransactionsRequest

from daybook_client import PastTransaction
from daybook_client.conversion import fill
from server.importing.found import Difference, Found, Kept, NewAccount, Options, Problem, Row, ShownBalance
from server.importing.spool import Spool
from server.ledger.errors import FieldInvalid
from server.ledger.names import is_account_id
from server.ledger.posting import check_sign
from server.transport.validation import check_account, read_request_id, read_timestamp, read_transaction


@dataclass(slots=True)
class Gathered:
    """What a source has, except for its rows."""

    accounts: dict[str, NewAccount] = field(default_factory=dict)
    """By id. The first description of an account, which is the newest, counts."""
    balances: dict[str, ShownBalance] = field(default_factory=dict)
    problems: Kept = field(default_factory=Kept)
    differences: Kept = field(default_factory=Kept)
    row_count: int = 0


def gather(
    found: Iterable[Found],
    spool: Spool,
    options: Options,
    report: Callable[[int], None],
    columns: Mapping[str, str] | None = None,
) -> Gathered:
    """Reads the source to its end; rows go to the spool. Calls `report` with the number of rows so far.

    `columns` are the columns of a table by the fields of a transaction, for problems.
    """
    gathered = Gathered()
    for each in found:
        match each:
            case Row():
                _add_row(each, spool, options, gathered, columns or {})
                report(gathered.row_count)
            case NewAccount():
                if each.id not in gathered.accounts:
                    gathered.accounts[each.id] = _checked(each, gathered)
            case ShownBalance():
                gathered.balances.setdefault(each.account_id, each)
            case Problem():
                gathered.problems.add(each)
            case Difference():
                gathered.differences.add(each)
    return gathered


def _checked(new: NewAccount, gathered: Gathered) -> NewAccount:
    """The account, or only its id, its kind and its hours if its description breaks a rule of CreateAccount."""
    account = Account()
    try:
        fill(account, {"display_name": new.display_name, "user": new.user, "company": new.company})
        check_account(account)
    except FieldInvalid as refusal:
        problem = f"{refusal.field.removeprefix('account.')} {refusal.problem}"
    except (ValueError, TypeError) as error:
        problem = str(error)
    else:
        return new
    gathered.problems.add(Problem(f"account {new.id}", problem))
    return NewAccount(id=new.id, kind=new.kind, hour_anchor_time=new.hour_anchor_time)


def _add_row(row: Row, spool: Spool, options: Options, gathered: Gathered, columns: Mapping[str, str]) -> None:
    if options.since is not None and row.past.create_time < options.since:
        return
    try:
        _check(row.past, options.now)
    except FieldInvalid as refusal:
        name = refusal.field.removeprefix("transaction.")
        # The field may be one within the field of the column, like owner.id.
        shown = columns.get(name) or columns.get(name.partition(".")[0])
        column = f", column {shown}" if shown else ""
        gathered.problems.add(Problem(f"{row.place}{column}", f"{name} {refusal.problem}"))
    except (ValueError, TypeError) as error:
        gathered.problems.add(Problem(row.place, str(error)))
    else:
        spool.add(row)
        gathered.row_count += 1


def _check(past: PastTransaction, now: datetime) -> None:
    """Applies the rules of ImportTransactions that don't depend on the ledger. Raises FieldInvalid or ValueError."""
    if not is_account_id(past.account.removeprefix("accounts/")):
        raise FieldInvalid("account", f"{past.account.removeprefix('accounts/')!r} can't be the id of an account")
    if past.create_time > now:
        raise FieldInvalid("create_time", "is in the future")
    item = ImportTransactionsRequest.Item()
    fill(item, {"transaction": past.transaction, "create_time": past.create_time, "request_id": past.request_id})
    read_request_id(item)
    time = read_timestamp("create_time", item.create_time)
    draft, _ = read_transaction(item.transaction)
    check_sign(draft)
    if draft.expire_time is not None and draft.expire_time <= time:
        raise FieldInvalid("expire_time", "must be after create_time")
