"""What callers have sent and what they got, and the comparison with the books."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from random import Random
from typing import Any, TypeAlias

import grpc
from daybook.v1.ledger_service_pb2 import (
    CreateTransactionRequest,
    ListTransactionsRequest,
    RefundTransactionRequest,
    TransferCreditsRequest,
    TransferCreditsResponse,
)
from daybook.v1.transaction_pb2 import Transaction, Usage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToJson, Parse

from tests.support.callers import Client
from tests.support.http_client import send
from tests.support.ledgers import ACCOUNT_IDS
from tests.support.refusals import read_refusal

CALL_SECONDS_MAX = 10.0
"""Deadline of each attempt of a call."""
BACKOFF_SECONDS_MAX = 0.05
RETRYABLE = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
UNANSWERED = {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT}
"""The same over REST."""
REFUSALS = {"INSUFFICIENT_CREDITS", "REFUND_EXCEEDS_CHARGE"}
"""Reasons for which the rules refuse a call of the workload."""
Call: TypeAlias = "CreateTransactionRequest | RefundTransactionRequest | TransferCreditsRequest"
Answer: TypeAlias = "Transaction | TransferCreditsResponse"
Send: TypeAlias = "Callable[[Call], Awaitable[Answer]]"
"""Sends a call once. Raises Unanswered or Refused."""


class Unanswered(Exception):
    """An attempt of a call has no answer."""


class Refused(Exception):
    """A call is refused. The argument is the reason."""


@dataclass
class Journal:
    """All calls of a scenario, by request_id, and the times of the answers."""

    clock: Callable[[], float] = time.monotonic
    sent: dict[str, Call] = field(default_factory=dict)
    acknowledged: dict[str, Answer] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    """The reasons of the refusals."""
    repeated: Counter[str] = field(default_factory=Counter)
    """How often a call was sent again because it got no answer."""
    repeated_reads: int = 0
    answer_times: list[float] = field(default_factory=list)
    """By the monotonic clock, in seconds."""
    slowest: float = 0.0
    """The longest time from the first attempt of a call to its answer, in seconds."""
    charges: list[str] = field(default_factory=list)
    """The names of acknowledged charges, for refunds."""

    def next_call(self, random: Random) -> Call:
        """A new call with a request_id of its own."""
        account_id, other_id = random.sample(ACCOUNT_IDS, 2)
        call: Call
        match random.randrange(5):
            case 0:
                grant = Transaction(kind=Transaction.GRANT, category="test", amount=str(random.randint(1, 50)))
                if random.random() < 0.3:
                    grant.ttl.CopyFrom(Duration(seconds=random.randint(1, 20)))
                call = CreateTransactionRequest(parent=f"accounts/{account_id}", transaction=grant)
            case 1 | 2:
                charge = Transaction(
                    kind=Transaction.CHARGE,
                    category="computing",
                    amount=f"-{random.randint(1, 20)}",
                    usage=Usage(model="m"),
                )
                call = CreateTransactionRequest(parent=f"accounts/{account_id}", transaction=charge)
            case 3 if self.charges:
                call = RefundTransactionRequest(name=random.choice(self.charges), amount="0.25")
            case _:
                call = TransferCreditsRequest(
                    name=f"accounts/{account_id}", destination=f"accounts/{other_id}", amount=str(random.randint(1, 9))
                )
        call.request_id = f"id-{len(self.sent)}"
        self.sent[call.request_id] = call
        return call

    async def perform(self, send_once: Send, call: Call, random: Random) -> None:
        """Sends a call until it is answered, and records the answer."""
        begun = self.clock()
        while True:
            try:
                answer = await send_once(call)
            except Unanswered:
                self.repeated[call.request_id] += 1
                await asyncio.sleep(random.uniform(0, BACKOFF_SECONDS_MAX))
                continue
            except Refused as refusal:
                self.refused[call.request_id] = str(refusal)
            else:
                self.acknowledged[call.request_id] = answer
                if isinstance(answer, Transaction) and answer.kind == Transaction.CHARGE:
                    self.charges.append(answer.name)
            self.answer_times.append(self.clock())
            self.slowest = max(self.slowest, self.clock() - begun)
            return

    async def read(self, client: Client, random: Random) -> None:
        """Reads a page of an account until it is answered."""
        begun = self.clock()
        request = ListTransactionsRequest(parent=f"accounts/{random.choice(ACCOUNT_IDS)}", page_size=10)
        while True:
            try:
                await client.ledger.ListTransactions(request, metadata=client.metadata, timeout=CALL_SECONDS_MAX)
            except grpc.aio.AioRpcError as error:
                if error.code() not in RETRYABLE:
                    raise
                self.repeated_reads += 1
                await asyncio.sleep(random.uniform(0, BACKOFF_SECONDS_MAX))
            else:
                self.slowest = max(self.slowest, self.clock() - begun)
                return

    async def check(self, client: Client) -> None:
        """Compares the books with the answers; AssertionError names the first difference."""
        rows = await client.history("-")
        stored = {row.name: row for row in rows}
        assert len(stored) == len(rows), "a list has a transaction twice"
        assert self.sent.keys() == self.acknowledged.keys() | self.refused.keys(), "a call has no answer"
        assert set(self.refused.values()) <= REFUSALS
        acknowledged = [each for answer in self.acknowledged.values() for each in _transactions(answer)]
        for each in acknowledged:
            assert stored.get(each.name) == each, f"acknowledged but not stored: {each.name}"
        others = stored.keys() - {each.name for each in acknowledged}
        assert all(stored[name].kind == Transaction.EXPIRATION for name in others), "stored but not acknowledged"
        effects = Counter(row.request_id for row in rows if row.kind != Transaction.TRANSFER_IN)
        del effects[""]
        assert set(effects.values()) <= {1}, "a request_id has two effects"
        assert effects.keys() == self.acknowledged.keys()
        assert await client.verify() == []

    async def check_repetitions(self, client: Client, random: Random, count: int) -> None:
        """Sends acknowledged calls again, those first that were repeated before: each gets the same answer."""
        chosen = [each for each in self.repeated if each in self.acknowledged][:count]
        chosen += random.sample(sorted(self.acknowledged), min(count, len(self.acknowledged)))
        for request_id in chosen:
            answer = await over_grpc(client)(self.sent[request_id])
            assert answer == self.acknowledged[request_id], request_id


def over_grpc(client: Client) -> Send:
    """Sends calls over gRPC."""
    methods: dict[type[Call], Any] = {
        CreateTransactionRequest: client.ledger.CreateTransaction,
        RefundTransactionRequest: client.ledger.RefundTransaction,
        TransferCreditsRequest: client.ledger.TransferCredits,
    }

    async def send_once(call: Call) -> Answer:
        try:
            answer: Answer = await methods[type(call)](call, metadata=client.metadata, timeout=CALL_SECONDS_MAX)
        except grpc.aio.AioRpcError as error:
            if error.code() in RETRYABLE:
                raise Unanswered from None
            raise Refused(read_refusal(error).reason) from None
        return answer

    return send_once


def over_rest(origin: str, client: Client) -> Send:
    """Sends new transactions over REST, each on a connection of its own, and other calls over gRPC."""
    others = over_grpc(client)

    async def send_once(call: Call) -> Answer:
        if not isinstance(call, CreateTransactionRequest):
            return await others(call)
        headers = {
            "authorization": f"Bearer {client.key}",
            "content-type": "application/json",
            "idempotency-key": call.request_id,
        }
        post = partial(send, method="POST", headers=headers, body=MessageToJson(call.transaction).encode())
        answer = await asyncio.to_thread(post, origin, f"/v1/{call.parent}/transactions")
        if answer.status == HTTPStatus.OK:
            return Parse(answer.body, Transaction())
        if answer.status in UNANSWERED:
            raise Unanswered
        error: Any = answer.json()
        raise Refused(error["details"][0]["reason"])

    return send_once


def _transactions(answer: Answer) -> list[Transaction]:
    """The transactions in an answer."""
    return [answer] if isinstance(answer, Transaction) else [answer.outgoing, answer.incoming]
