"""Lists of transactions in plain Python: rows, the filters of lists, and the lists that they must give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TypeAlias

from daybook.v1.transaction_pb2 import Transaction
from google.protobuf.struct_pb2 import Struct
from sqlalchemy import insert, update

from server.ledger.instants import SECOND, from_timestamp, to_timestamp, write
from server.ledger.posting import Kind
from server.store.tables import LABELS, account_states, transactions
from tests.support.callers import Client, Server
from tests.support.clock import NOON, Clock
from tests.support.databases import writing

GRANT, CHARGE, ADJUSTMENT = Transaction.GRANT, Transaction.CHARGE, Transaction.ADJUSTMENT

Matches: TypeAlias = Callable[[Transaction], bool]
AccountNumbers: TypeAlias = dict[str, int]
"""The number of each account, by its id."""


@dataclass(frozen=True)
class Row:
    """A transaction and the number of its account, which determine its place in every order."""

    transaction: Transaction
    account_number: int

    @property
    def account_id(self) -> str:
        """The id of the account."""
        return self.transaction.name.split("/")[1]

    def key(self, order_by: str) -> tuple[Decimal, int, int]:
        """The row's sort key, which is unique."""
        if order_by.startswith("amount"):
            position = Decimal(self.transaction.amount)
        else:
            position = Decimal(from_timestamp(self.transaction.create_time))
        return position, self.account_number, self.transaction.sequence


def expected(rows: Iterable[Row], parent: str, matches: Matches, order_by: str) -> list[str]:
    """The names that a list must have, in order."""
    account_id = parent.removeprefix("accounts/")
    matching = [row for row in rows if account_id in ("-", row.account_id) and matches(row.transaction)]
    matching.sort(key=lambda row: row.key(order_by), reverse=order_by == "" or order_by.endswith(" desc"))
    return [row.transaction.name for row in matching]


def time_literal(seconds: float) -> str:
    """The time literal of a filter, `seconds` after NOON."""
    return f'"{write(NOON + round(seconds * SECOND))}"'


def at(transaction: Transaction) -> float:
    """The create_time, in seconds since NOON."""
    return (from_timestamp(transaction.create_time) - NOON) / SECOND


def everything(_: Transaction) -> bool:
    """Passes every transaction."""
    return True


def nothing(_: Transaction) -> bool:
    """Passes none."""
    return False


FILTERS: list[tuple[str, Matches]] = [
    ("", everything),
    ("kind = CHARGE", lambda each: each.kind == CHARGE),
    ('kind = "GRANT"', lambda each: each.kind == GRANT),
    ("kind = REFUND", lambda each: each.kind == Transaction.REFUND),
    ("(kind = CHARGE OR kind = ADJUSTMENT)", lambda each: each.kind in (CHARGE, ADJUSTMENT)),
    ("kind = CHARGE OR kind = ADJUSTMENT", lambda each: each.kind in (CHARGE, ADJUSTMENT)),
    ('category = "ai_chat"', lambda each: each.category == "ai_chat"),
    ("category = nothing_has_this", nothing),
    (
        '(category = "ai_chat" OR category = "purchase")',
        lambda each: each.category in ("ai_chat", "purchase"),
    ),
    ("category = ai_chat OR category = ai_chat", lambda each: each.category == "ai_chat"),
    (
        " OR ".join(f"category = {name}" for name in ("ai_chat", "storage", *(f"other_{n}" for n in range(14)))),
        lambda each: each.category in ("ai_chat", "storage"),
    ),
    ("kind = CHARGE AND category = ai_chat", lambda each: (each.kind, each.category) == (CHARGE, "ai_chat")),
    (
        "(kind = CHARGE OR kind = GRANT) AND (category = ai_chat OR category = purchase)",
        lambda each: each.kind in (CHARGE, GRANT) and each.category in ("ai_chat", "purchase"),
    ),
    ("state = SUCCEEDED", everything),
    ("state = FAILED OR state = CANCELED", nothing),
    ("state = FAILED AND (category = ai_chat OR category = storage)", nothing),
    ("state = SUCCEEDED AND category = ai_chat", lambda each: each.category == "ai_chat"),
    (f"create_time >= {time_literal(10)}", lambda each: at(each) >= 10),
    (f"create_time > {time_literal(10)}", lambda each: at(each) > 10),
    (f"create_time < {time_literal(10)}", lambda each: at(each) < 10),
    (f"create_time <= {time_literal(10)}", lambda each: at(each) <= 10),
    (f"create_time > {time_literal(9.999999)}", lambda each: at(each) > 9.9999985),
    (f"create_time >= {time_literal(10)} AND create_time < {time_literal(20)}", lambda each: 10 <= at(each) < 20),
    (f"create_time > {time_literal(0)} AND create_time <= {time_literal(20)}", lambda each: 0 < at(each) <= 20),
    (f"create_time > {time_literal(20)} AND create_time < {time_literal(10)}", nothing),
    ('create_time >= "2024-10-10T14:00:10+02:00"', lambda each: at(each) >= 10),
    ('labels.location = "L 1"', lambda each: each.labels.get("location") == "L 1"),
    ("labels.membership = m-1", lambda each: each.labels.get("membership") == "m-1"),
    ('labels.company = "c \\"1\\" \\\\"', lambda each: each.labels.get("company") == 'c "1" \\'),
    ('labels.location = ""', nothing),
    (
        'labels.location = "L 1" AND labels.membership = m-1',
        lambda each: (each.labels.get("location"), each.labels.get("membership")) == ("L 1", "m-1"),
    ),
    (
        f'labels.location = "L 1" AND kind = CHARGE AND category = ai_chat AND create_time >= {time_literal(10)}',
        lambda each: (
            (each.labels.get("location"), each.kind, each.category) == ("L 1", CHARGE, "ai_chat") and at(each) >= 10
        ),
    ),
    (
        f"kind=CHARGE AND(category=ai_chat OR category=storage)AND state=SUCCEEDED AND create_time<{time_literal(20)}",
        lambda each: each.kind == CHARGE and each.category in ("ai_chat", "storage") and at(each) < 20,
    ),
    (
        "((kind = CHARGE)) AND ((category = ai_chat OR category = storage))",
        lambda each: each.kind == CHARGE and each.category in ("ai_chat", "storage"),
    ),
]

LISTS = [
    ("accounts/a", ""),
    ("accounts/a", "create_time"),
    ("accounts/a", "amount desc"),
    ("accounts/a", "amount"),
    ("accounts/-", "create_time desc"),
    ("accounts/-", "create_time"),
]
"""Every kind of list: a parent and an order, by default `create_time desc`."""

Step: TypeAlias = "tuple[float, str, Kind, str, str, dict[str, str]]"
STEPS: list[Step] = [
    # Seconds to wait before, account, kind, category, amount, labels.
    (0, "a", GRANT, "purchase", "5", {}),
    (0, "b", GRANT, "purchase", "5", {"location": "L 1"}),
    (0, "a", CHARGE, "ai_chat", "-2", {"location": "L 1", "membership": "m-1"}),
    (0, "a", CHARGE, "ai_chat", "-2", {"location": "l 1", "company": 'c "1" \\'}),
    (0, "Z", ADJUSTMENT, "ai_chat", "-7.5", {"project": "L 1"}),
    (10, "a", CHARGE, "storage", "-2", {"location": "L 1"}),
    (0, "a", ADJUSTMENT, "ai_chat", "0.000001", {"membership": "m-1"}),
    (0, "b", CHARGE, "ai_chat", "-10", {"location": "L 1", "membership": "m-1", "company": 'c "1" \\'}),
    (0, "a", CHARGE, "ai_chat", "-10", {"location": "L 1"}),
    (10, "a", GRANT, "ai_chat", "100", {"membership": "M-1"}),
    (0, "Z", CHARGE, "storage", "-0.000001", {}),
    (0, "a", CHARGE, "ai_chat", "-2", {"location": "L 1", "membership": "m-1"}),
    (0.000001, "a", GRANT, "purchase", "5", {"company": "c-1"}),
    (0, "b", CHARGE, "storage", "-2", {"membership": "m-1"}),
    (-15, "a", CHARGE, "storage", "-1", {}),
]
"""Ties in time and amount, within an account and between accounts, and a clock that goes back."""


async def post_steps(client: Client, clock: Clock) -> list[Row]:
    """Posts STEPS; returns the rows."""
    numbers: AccountNumbers = {}
    # The order of creation differs from the order of ids.
    for account_id in ("b", "a", "Z"):
        numbers[account_id] = (await client.create_account(account_id, credit_limit="1000")).number
    rows = []
    for seconds, account_id, kind, category, amount, labels in STEPS:
        clock.advance(seconds)
        posted = await client.post(account_id, kind, amount, category=category, labels=labels)
        rows.append(Row(posted, numbers[account_id]))
    return rows


async def two_tenants(server: Server, clock: Clock) -> tuple[Client, list[Row]]:
    """A client of a tenant with rows, beside a tenant whose equal accounts and rows must never show."""
    client = await server.client(await server.create_tenant("house"))
    neighbour = await server.client(await server.create_tenant("neighbour"))
    await post_steps(neighbour, Clock())
    clock.now = NOON
    return client, await post_steps(client, clock)


def make_row(
    account_id: str,
    account_number: int,
    sequence: int,
    *,
    kind: Kind = GRANT,
    category: str = "test",
    state: Transaction.State.ValueType = Transaction.SUCCEEDED,
    amount: int = 1,
    at_seconds: float = 0,
    labels: dict[str, str] | None = None,
    metadata: Struct | None = None,
) -> Row:
    """A row of any kind and state, also those that no call posts. Its uid encodes its account and sequence."""
    uid = f"00000000-0000-7000-8000-{account_number:04x}{sequence:08x}"
    transaction = Transaction(
        name=f"accounts/{account_id}/transactions/{uid}",
        uid=uid,
        sequence=sequence,
        create_time=to_timestamp(NOON + round(at_seconds * SECOND)),
        kind=kind,
        category=category,
        state=state,
        amount=str(amount),
        labels=labels,
        metadata=metadata,
    )
    return Row(transaction, account_number)


async def insert_rows(server: Server, tenant_number: int, rows: Sequence[Row]) -> None:
    """Stores rows directly, without the rules of posting."""
    values = [
        {
            "account_number": row.account_number,
            "sequence": row.transaction.sequence,
            "tenant_number": tenant_number,
            "uid": bytes.fromhex(row.transaction.uid.replace("-", "")),
            "create_time": from_timestamp(row.transaction.create_time),
            "month": 202410,
            "kind": row.transaction.kind,
            "category": row.transaction.category,
            "state": row.transaction.state,
            "amount": int(row.transaction.amount) * 1_000_000,
            "balance_after": 0,
            **{label: row.transaction.labels.get(label) for label in LABELS},
            "body": row.transaction.SerializeToString(deterministic=True),
            "allocations": b"",
            "hash": b"",
        }
        for row in rows
    ]
    if values:
        async with writing(server.book.database) as connection:
            await connection.execute(insert(transactions), values)
            for number, sequence in {row.account_number: row.transaction.sequence for row in rows}.items():
                await connection.execute(
                    update(account_states).where(account_states.c.account_number == number).values(sequence=sequence)
                )
