"""A server that is killed at any moment, over and over: what was acknowledged is there, once."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TypeAlias

import grpc
import pytest
from daybook.v1.ledger_service_pb2 import (
    CreateTransactionRequest,
    RefundTransactionRequest,
    TransferCreditsRequest,
    TransferCreditsResponse,
)
from daybook.v1.transaction_pb2 import Transaction, Usage
from google.protobuf.duration_pb2 import Duration

from tests.support.callers import Client
from tests.support.ledgers import ACCOUNT_IDS, prepare
from tests.support.refusals import read_refusal

DAYBOOK = str(Path(sys.executable).parent / "daybook")
CRASHES = 8
CALLERS = 32
START_SECONDS_MAX = 60

Call: TypeAlias = "CreateTransactionRequest | RefundTransactionRequest | TransferCreditsRequest"
Answer: TypeAlias = "Transaction | TransferCreditsResponse"


@dataclass
class Story:
    """What callers have sent and heard, over all crashes."""

    sent: dict[str, Call] = field(default_factory=dict)
    """By request_id."""
    acknowledged: dict[str, Answer] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    """The reasons."""
    charges: list[str] = field(default_factory=list)
    """The names of charges that were acknowledged."""

    @property
    def in_doubt(self) -> list[str]:
        """The ids of the requests of which nobody knows whether they were done."""
        return [each for each in self.sent if each not in self.acknowledged and each not in self.refused]

    def next_call(self, random: Random) -> Call:
        """Another request, with an id of its own."""
        request_id = f"id-{len(self.sent)}"
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
        call.request_id = request_id
        self.sent[request_id] = call
        return call


async def send(client: Client, call: Call) -> Answer:
    """Sends a request by the method that is its own."""
    if isinstance(call, CreateTransactionRequest):
        return await client.ledger.CreateTransaction(call, metadata=client.metadata)
    if isinstance(call, RefundTransactionRequest):
        return await client.ledger.RefundTransaction(call, metadata=client.metadata)
    return await client.ledger.TransferCredits(call, metadata=client.metadata)


async def attempt(client: Client, story: Story, call: Call) -> bool:
    """Sends a request and notes what comes of it; False if the server is gone."""
    try:
        answer = await send(client, call)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            return False
        story.refused[call.request_id] = read_refusal(error).reason
        return True
    story.acknowledged[call.request_id] = answer
    if isinstance(answer, Transaction) and answer.kind == Transaction.CHARGE:
        story.charges.append(answer.name)
    return True


async def keep_calling(client: Client, story: Story, random: Random) -> None:
    """Sends one request after the other until the server is gone."""
    while await attempt(client, story, story.next_call(random)):
        pass


@asynccontextmanager
async def daybook(database_url: str, key: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, Client]]:
    """Runs `daybook serve` as a process of its own; kills it in the end if nobody else has."""
    process = await asyncio.create_subprocess_exec(
        DAYBOOK,
        *("serve", "--port", "0", "--database-url", database_url, "--log-format", "json"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{await port_of(process)}") as channel:
            yield process, Client(channel, key)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def port_of(process: asyncio.subprocess.Process) -> int:
    """The port on which a server that has just been started listens, by its own word."""
    assert process.stdout is not None
    async with asyncio.timeout(START_SECONDS_MAX):
        async for line in process.stdout:
            if line.startswith(b"{") and (told := json.loads(line))["event"] == "serving":
                return int(told["port"])
    raise AssertionError("the server did not start")


def transactions_of(answer: Answer) -> list[Transaction]:
    """The transactions in an answer."""
    return [answer] if isinstance(answer, Transaction) else [answer.outgoing, answer.incoming]


@pytest.mark.long
async def test_killed_over_and_over(tmp_path: Path) -> None:
    """After any number of crashes nothing acknowledged is lost, nothing is there twice, and a repetition is safe."""
    database_url = f"sqlite+aiosqlite:///{tmp_path}/daybook.db"
    key = await prepare(database_url)
    story = Story()
    for crash in range(CRASHES):
        random = Random(crash)
        async with daybook(database_url, key) as (process, client):
            calls = [asyncio.create_task(keep_calling(client, story, Random(f"{crash}-{n}"))) for n in range(CALLERS)]
            # The moment of the crash is what is tried here: some calls later, however fast the machine is.
            wanted = len(story.acknowledged) + random.randint(11, 60)
            async with asyncio.timeout(START_SECONDS_MAX):
                while len(story.acknowledged) < wanted:
                    await asyncio.sleep(random.uniform(0.0001, 0.01))
            process.kill()
            await process.wait()
            await asyncio.wait_for(asyncio.gather(*calls), timeout=30)
    assert len(story.acknowledged) > 10 * CRASHES, "there was hardly anything to lose"
    in_doubt = story.in_doubt
    assert len(in_doubt) >= CRASHES, "the crashes hit nobody"

    async with daybook(database_url, key) as (process, client):
        await check_books(client, story)
        repeated = in_doubt + Random(0).sample(sorted(story.acknowledged), 10 * CRASHES)
        for request_id in repeated:
            before = story.acknowledged.get(request_id)
            assert await attempt(client, story, story.sent[request_id])
            assert before is None or story.acknowledged[request_id] == before, "a repetition got another answer"
        assert not story.in_doubt
        rows = await check_books(client, story)
        # Now that all is known, there is nothing but what was acknowledged, and expirations.
        acknowledged = {each.name for answer in story.acknowledged.values() for each in transactions_of(answer)}
        expirations = {row.name for row in rows if row.kind == Transaction.EXPIRATION}
        assert {row.name for row in rows} == acknowledged | expirations
        process.terminate()
        assert await asyncio.wait_for(process.wait(), timeout=30) == 0


async def check_books(client: Client, story: Story) -> list[Transaction]:
    """Holds the books to what was acknowledged and refused; gives all transactions."""
    rows = await client.history("-")
    stored = {row.name: row for row in rows}
    assert len(stored) == len(rows)
    for answer in story.acknowledged.values():
        for each in transactions_of(answer):
            assert stored[each.name] == each
    # A transfer has one transaction on each side, all else has one.
    times = Counter(row.request_id for row in rows if row.kind != Transaction.TRANSFER_IN)
    del times[""]
    assert set(times.values()) == {1}
    incoming = Counter(row.request_id for row in rows if row.kind == Transaction.TRANSFER_IN)
    assert incoming == Counter(row.request_id for row in rows if row.kind == Transaction.TRANSFER_OUT)
    assert not story.refused.keys() & times.keys()
    assert set(story.refused.values()) <= {"INSUFFICIENT_CREDITS", "REFUND_EXCEEDS_CHARGE"}
    assert times.keys() <= story.sent.keys()
    assert await client.verify() == []
    return rows
