"""Shell commands that list seeded data, as `daybook seed` prints them."""

from __future__ import annotations

from server.demo.guide import Gateway, to_text
from server.ledger.instants import Instant, month_of
from server.seed.history import DAY
from server.seed.load import HOT_ACCOUNT


def what_to_try(gateway: Gateway, *, key: str, hot_key: str, network: str, until: Instant) -> str:
    """The text that `daybook seed` prints: a command for each list.

    `hot_key` is bound to the account with the most transactions.
    """
    month = month_of(until - 31 * DAY)
    commands = {
        "Teable: what a space consumed": gateway.rest(
            key, f"/api/space/{HOT_ACCOUNT}/billing/credit-history?month={month // 100}-{month % 100:02}&take=3"
        ),
        "Nebula Block: hours of use": gateway.rest(hot_key, "/users/credits/history?limit=2&offset=10"),
        "Spacebring: the transactions of a network": gateway.rest(
            key, "/transactions/credits/v1?limit=2", "-H", f"spacebring-network-id: {network}"
        ),
        "Dreadnode: the transactions of an organization": gateway.rest(
            key, f"/api/v1/org/{HOT_ACCOUNT}/credits/transactions?limit=3"
        ),
        "Paged: an account's transactions by page number": gateway.rest(
            key, f"/api/billing/accounts/{HOT_ACCOUNT}/transactions?page=10&page_size=10"
        ),
        "Native REST: the newest transactions of all accounts": gateway.rest(
            key, "/v1/accounts/-/transactions?pageSize=2"
        ),
        "Native gRPC, by reflection": gateway.list_transactions(key, HOT_ACCOUNT),
    }
    return to_text("While `daybook up` serves this database, try:", commands)
