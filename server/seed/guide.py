"""What to try with seeded data, as commands to paste."""

from __future__ import annotations

from server.demo.guide import list_command, rest_command
from server.ledger.instants import Instant, month_of
from server.seed.history import DAY
from server.seed.load import HOT_ACCOUNT


def commands(
    gateway_port: int, gateway_host: str, *, key: str, hot_key: str, network: str, until: Instant
) -> dict[str, str]:
    """A command for each list, by what it shows. `hot_key` is bound to the account with the most transactions."""
    month = month_of(until - 31 * DAY)

    def curl(path: str, *more: str) -> str:
        return rest_command(gateway_port, key, path, *more, gateway_host=gateway_host)

    return {
        "Teable: what a space consumed": curl(
            f"/api/space/{HOT_ACCOUNT}/billing/credit-history?month={month // 100}-{month % 100:02}&take=3"
        ),
        "Nebula Block: hours of use": rest_command(
            gateway_port, hot_key, "/users/credits/history?limit=2&offset=10", gateway_host=gateway_host
        ),
        "Spacebring: the transactions of a network": curl(
            "/transactions/credits/v1?limit=2", "-H", f"spacebring-network-id: {network}"
        ),
        "Dreadnode: the transactions of an organization": curl(
            f"/api/v1/org/{HOT_ACCOUNT}/credits/transactions?limit=3"
        ),
        "Paged: an account's transactions by page number": curl(
            f"/api/billing/accounts/{HOT_ACCOUNT}/transactions?page=10&page_size=10"
        ),
        "Native REST: the newest transactions of all accounts": curl("/v1/accounts/-/transactions?pageSize=2"),
        "Native gRPC, by reflection": list_command(gateway_port, key, HOT_ACCOUNT, gateway_host=gateway_host),
    }


def what_to_try(commands: dict[str, str]) -> str:
    """All of them, to print."""
    parts = [f"# {title}\n{command}" for title, command in commands.items()]
    return "\n\n".join(["", "While `daybook up` serves this database, try:", *parts, ""])
