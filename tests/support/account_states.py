"""Account states, the input of the rules of the ledger."""

from __future__ import annotations

from server.ledger.instants import HOUR, Instant
from server.ledger.lots import Lot, Terms, sort_lots
from server.ledger.money import Millionths
from server.ledger.posting import AccountState
from server.ledger.usage import UsageWindow

NOW: Instant = 480_000 * HOUR


def lot(number: int, remaining: Millionths, expire_time: Instant | None = None, priority: int = 0) -> Lot:
    """Returns a full lot. The sequence of the transaction that opened it equals its number."""
    return Lot(number, number, Terms(expire_time, priority), remaining, remaining)


def account(
    *lots: Lot,
    number: int = 7,
    account_id: str = "acme",
    debt: Millionths = 0,
    credit_limit: Millionths = 0,
    last_create_time: Instant = NOW - HOUR,
    window: UsageWindow | None = None,
) -> AccountState:
    """Returns the state of an account with these lots or this debt, and one transaction per lot."""
    newest = max((each.number for each in lots), default=0)
    return AccountState(
        account_number=number,
        account_id=account_id,
        tenant_number=3,
        credit_limit=credit_limit,
        hour_anchor=0,
        balance=sum(each.remaining for each in lots) - debt,
        debt=debt,
        lots=sort_lots(lots),
        lot_count=newest,
        open_lot_count=len(lots),
        expiring=sum(each.remaining for each in lots if each.terms.expire_time is not None),
        sequence=newest,
        last_create_time=last_create_time,
        window=window,
    )
