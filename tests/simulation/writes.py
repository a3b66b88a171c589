"""What clients write. Each function is one action of a client."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from typing import Any

from daybook.v1.account_pb2 import Account
from daybook.v1.admin_service_pb2 import ImportTransactionsRequest, ImportTransactionsResponse
from daybook.v1.ledger_service_pb2 import (
    BatchCreateTransactionsRequest,
    BatchCreateTransactionsResponse,
    CreateAccountRequest,
    CreateTransactionRequest,
    RefundTransactionRequest,
    SubmitTransactionsRequest,
    SubmitTransactionsResponse,
    TransferCreditsRequest,
    TransferCreditsResponse,
    UpdateAccountRequest,
)
from daybook.v1.transaction_pb2 import Transaction
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.rpc.error_details_pb2 import ErrorInfo

from server.ledger import money
from server.ledger.instants import SECOND, Instant, to_timestamp
from server.ledger.money import Millionths
from tests.simulation.books import Effect, Violation
from tests.simulation.client import LACKS, UNKNOWN, Client, Mutation, Refused, Unknown, check_reason
from tests.simulation.model import Intent

GRANT, CHARGE, ADJUSTMENT = Transaction.GRANT, Transaction.CHARGE, Transaction.ADJUSTMENT
CREDIT: Millionths = 1_000_000
CATEGORIES = ("credit_package", "ai_chat", "booking", "inference", "computing", "serverless")
"""Grants of the first one are listed by Spacebring; charges of the others by Teable, Spacebring and Dreadnode, in this
order, and those of the last two by Nebula Block."""


def _amount(client: Client) -> Millionths:
    return client.random.choice((1, 2, 5, 10, 25)) * CREDIT


def _request_id(client: Client) -> str:
    """The request_id of the newest tag, or none."""
    return f"{client.name}/{client.count}" if client.random.random() < 0.8 else ""


def _draft(client: Client, tag: str, account: str) -> tuple[Transaction, Effect]:
    """A transaction to be created, and its effect."""
    random, world = client.random, client.world
    kind = random.choice((GRANT, GRANT, CHARGE, CHARGE, CHARGE, ADJUSTMENT))
    amount = _amount(client)
    if kind == CHARGE or (kind == ADJUSTMENT and random.random() < 0.5):
        amount = -amount
    draft = Transaction(kind=kind, amount=money.write(amount), category=random.choice(CATEGORIES), description=tag)
    if kind == CHARGE:
        draft.usage.model = "m"
    terms: dict[str, Any] = {}
    if amount > 0:
        draft.priority = terms["priority"] = random.choice((0, 0, 1))
        life = round(random.choice((0.5, 4, 30)) * world.pace * SECOND)
        match random.randrange(3):
            case 0:
                terms["expire_time"] = world.now + life
                draft.expire_time.CopyFrom(to_timestamp(terms["expire_time"]))
            case 1:
                # The shortest ttl of the contract is a second.
                life = terms["time_to_live"] = max(life, SECOND)
                draft.ttl.CopyFrom(Duration(seconds=life // SECOND, nanos=life % SECOND * 1000))
    return draft, Effect(account, kind, amount, **terms)


async def create(client: Client) -> None:
    """Creates a transaction, and at times another one with the same request_id at the same time."""
    tag, account = client.new_tag(), client.pick_account()
    draft, effect = _draft(client, tag, account)
    if effect.kind == CHARGE and client.random.random() < 0.2:
        effect = Effect(account, CHARGE, effect.amount, may_be_declined=True)
    request = CreateTransactionRequest(
        parent=f"accounts/{account}",
        transaction=draft,
        request_id=_request_id(client),
        record_declined=effect.may_be_declined,
    )

    def check(start: Instant) -> None:
        _check_insufficient(client, [effect], start, borrows=True)

    def mutation(tag: str) -> Mutation:
        body = CreateTransactionRequest()
        body.CopyFrom(request)
        body.transaction.description = tag
        intent = client.world.model.intend(Intent(tag, account, request.request_id, (effect,)))
        return Mutation(intent, "CreateTransaction", body, lambda answer: [answer], check)

    mutations = [mutation(tag)]
    if request.request_id and client.random.random() < 0.15:
        mutations.append(mutation(client.new_tag()))
    await asyncio.gather(*map(client.mutate, mutations))


def _check_insufficient(client: Client, effects: Iterable[Effect], start: Instant, *, borrows: bool) -> None:
    """Checks that at some time since `start` one of the accounts had too few credits for what the effects take."""
    world, taken = client.world, Counter[str]()
    for effect in effects:
        if effect.amount < 0:
            taken[effect.account] -= effect.amount
    if all(
        world.model.always_has(account, amount, start, world.now, ahead=world.clock_error_max, borrows=borrows)
        for account, amount in taken.items()
    ):
        raise Violation(f"{dict(taken)} is refused, although there was always as much")


async def repeat(client: Client) -> None:
    """Repeats a mutation that was acknowledged earlier: it gets its first answer and changes nothing."""
    if client.acknowledged:
        await client.mutate(client.random.choice(client.acknowledged))


async def create_batch(client: Client) -> None:
    """Creates several transactions, all or none."""
    tag = client.new_tag()
    request = BatchCreateTransactionsRequest(parent="accounts/-", request_id=_request_id(client))
    effects = []
    for _ in range(client.random.randint(2, 4)):
        account = client.pick_account()
        draft, effect = _draft(client, tag, account)
        request.requests.add(parent=f"accounts/{account}", transaction=draft)
        effects.append(effect)

    def bodies(answer: bytes) -> list[bytes]:
        found = BatchCreateTransactionsResponse.FromString(answer).transactions
        return [each.SerializeToString(deterministic=True) for each in found]

    def check(start: Instant) -> None:
        _check_insufficient(client, effects, start, borrows=True)

    intent = client.world.model.intend(Intent(tag, effects[0].account, request.request_id, tuple(effects)))
    await client.mutate(Mutation(intent, "BatchCreateTransactions", request, bodies, check))


async def transfer(client: Client) -> None:
    """Moves credits between two accounts."""
    tag = client.new_tag()
    source, destination = client.random.sample(("cash", "credit", "small"), 2)
    amount = _amount(client)
    request = TransferCreditsRequest(
        name=f"accounts/{source}",
        destination=f"accounts/{destination}",
        amount=money.write(amount),
        request_id=_request_id(client),
        description=tag,
    )
    effects = (
        Effect(source, Transaction.TRANSFER_OUT, -amount),
        Effect(destination, Transaction.TRANSFER_IN, amount),
    )

    def bodies(answer: bytes) -> list[bytes]:
        found = TransferCreditsResponse.FromString(answer)
        return [each.SerializeToString(deterministic=True) for each in (found.outgoing, found.incoming)]

    def check(start: Instant) -> None:
        _check_insufficient(client, effects, start, borrows=False)

    intent = client.world.model.intend(Intent(tag, source, request.request_id, effects))
    await client.mutate(Mutation(intent, "TransferCredits", request, bodies, check))


async def refund(client: Client) -> None:
    """Refunds all or half of a charge."""
    account = client.world.model.accounts[client.pick_account()]
    charges = [row for row in account.rows if row.kind == CHARGE and row.state == Transaction.SUCCEEDED]
    if not charges:
        return
    charge = client.random.choice(charges)
    amount = client.random.choice((-charge.amount, -charge.amount // 2))
    tag = client.new_tag()
    request = RefundTransactionRequest(
        name=charge.message.name, amount=money.write(amount), request_id=_request_id(client), description=tag
    )

    def check(_: Instant) -> None:
        if account.refunded.get(charge.message.name, 0) + amount <= -charge.amount:
            raise Violation(f"{tag}: a refund of {amount} is refused, although {charge} has as much left")

    effect = Effect(account.id, Transaction.REFUND, amount)
    intent = client.world.model.intend(Intent(tag, account.id, request.request_id, (effect,)))
    await client.mutate(Mutation(intent, "RefundTransaction", request, lambda answer: [answer], check))


async def submit(client: Client) -> None:
    """Creates several transactions, each by itself, and submits again those whose outcome is unknown."""
    world, model = client.world, client.world.model
    left: list[tuple[CreateTransactionRequest, Intent]] = []
    for _ in range(client.random.randint(2, 4)):
        tag, account = client.new_tag(), client.pick_account()
        draft, effect = _draft(client, tag, account)
        intent = model.intend(Intent(tag, account, f"{client.name}/{client.count}", (effect,)))
        request = CreateTransactionRequest(
            parent=f"accounts/{account}", transaction=draft, request_id=intent.request_id
        )
        left.append((request, intent))
    while left:
        start = world.now
        for _, intent in left:
            intent.open_calls += 1
        submitted = SubmitTransactionsRequest(parent="accounts/-", requests=[each for each, _ in left])
        try:
            answer = await client.call("Ledger", "SubmitTransactions", submitted)
        except Unknown:
            await client.rest()
            continue
        results = SubmitTransactionsResponse.FromString(answer).results
        again = []
        for (request, intent), result in zip(left, results, strict=True):
            info = ErrorInfo()
            if result.HasField("transaction"):
                intent.open_calls -= 1
                body = result.transaction.SerializeToString(deterministic=True)
                model.acknowledge(intent, body, [body])
            elif result.error.details[0].Unpack(info) and info.reason in UNKNOWN:
                again.append((request, intent))
            else:
                intent.open_calls -= 1
                model.refuse(intent, info.reason, start)
                check_reason(info.reason, intent, "SubmitTransactions")
                if info.reason in LACKS:
                    _check_insufficient(client, intent.effects, start, borrows=True)
                if intent.open_calls and not world.faults_ended:
                    again.append((request, intent))
        left = again
        await client.rest()


async def import_history(client: Client) -> None:
    """Imports history into an account of its own, in several messages, and repeats that until all of it is there."""
    model, random, world = client.world.model, client.random, client.world
    account = f"old-{client.name}"
    if account not in model.accounts:
        await _create_account(client, account)
    time = max(model.accounts[account].last_create_time, world.now - 1000 * SECOND)
    items, intents = [], []
    for _ in range(random.randint(2, 6)):
        tag = client.new_tag()
        time += random.choice((0, 0, 1, 1000)) * random.randint(0, 1000)
        amount = _amount(client)
        draft = Transaction(kind=GRANT, amount=money.write(amount), category="credit_package", description=tag)
        life = None
        if random.random() < 0.3:
            life = 5 * SECOND
            draft.ttl.CopyFrom(Duration(seconds=5))
        effect = Effect(account, GRANT, amount, create_time=time, time_to_live=life)
        intents.append(model.intend(Intent(tag, account, f"{client.name}/{client.count}", (effect,))))
        items.append(
            ImportTransactionsRequest.Item(
                parent=f"accounts/{account}",
                transaction=draft,
                create_time=to_timestamp(time),
                request_id=intents[-1].request_id,
            )
        )
    size = random.randint(1, 3)

    async def stream() -> AsyncIterator[ImportTransactionsRequest]:
        for first in range(0, len(items), size):
            await world.faults.delay()
            yield ImportTransactionsRequest(items=items[first : first + size])

    while True:
        for intent in intents:
            intent.open_calls += 1
        try:
            answer = await client.call("Admin", "ImportTransactions", stream)
        except Unknown:
            await client.rest()
            continue
        except Refused as refusal:
            # A sweep may have posted expirations, which are newer than the rest of this history.
            if refusal.reason != "FIELD_INVALID" or not model.accounts[account].lots:
                raise
            return
        total = ImportTransactionsResponse.FromString(answer)
        if total.imported_count + total.skipped_count != len(items):
            raise Violation(f"{total.imported_count} + {total.skipped_count} of {len(items)} items are imported")
        for intent in intents:
            intent.open_calls -= 1
            model.acknowledge(intent, b"", [row.body for row in intent.rows])
        return


async def _create_account(client: Client, account_id: str) -> None:
    tag = client.new_tag()
    request = CreateAccountRequest(
        account_id=account_id,
        account=Account(kind=Account.SPACE, display_name=tag),
        request_id=f"{client.name}/{client.count}",
    )
    intent = client.world.model.intend(Intent(tag, account_id, request.request_id, (), credit_limit=0))
    await client.mutate(Mutation(intent, "CreateAccount", request, lambda _: []))


async def create_account(client: Client) -> None:
    """Creates an account."""
    await _create_account(client, f"{client.name}-{client.count}")


async def update_account(client: Client) -> None:
    """Changes the credit limit of an account."""
    tag, account = client.new_tag(), client.random.choice(("credit", "small"))
    limit = client.random.choice((0, 5, 20, 60)) * CREDIT
    request = UpdateAccountRequest(
        account=Account(name=f"accounts/{account}", display_name=tag, credit_limit=money.write(limit)),
        update_mask=FieldMask(paths=["display_name", "credit_limit"]),
        request_id=f"{client.name}/{client.count}",
    )
    intent = client.world.model.intend(Intent(tag, account, request.request_id, (), credit_limit=limit))
    await client.mutate(Mutation(intent, "UpdateAccount", request, lambda _: []))


WRITES = (
    (create, 9),
    (repeat, 2),
    (create_batch, 2),
    (submit, 2),
    (transfer, 3),
    (refund, 3),
    (import_history, 1),
    (update_account, 1),
    (create_account, 1),
)
"""Each action, with its weight."""
