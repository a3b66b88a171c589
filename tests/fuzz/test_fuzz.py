"""A small share of the campaign, and what its checks find. Tests of what it found are beside the code that failed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial
from random import Random
from types import SimpleNamespace
from typing import cast

import pytest

from tests.fuzz.campaign import KINDS, Figures, run
from tests.fuzz.mutations import mutated, reordered
from tests.fuzz.requests import BINDINGS, RPC_METHODS
from tests.fuzz.target import Target, Tenant, target_in
from tests.support.examples import examples
from tests.support.methods import METHODS
from tests.support.processes import Ports

INPUTS = {
    "messages": 600,
    "rest": 400,
    "http1-server": 100,
    "http1-gateway": 100,
    "http2-server": 200,
    "http2-gateway": 50,
}
SEED = 0


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A server and a gateway, whose logs must have no fault at the end."""
    with target_in(tmp_path_factory.mktemp("fuzz")) as target:
        yield target


@pytest.fixture(scope="module")
def tenant(target: Target) -> Tenant:
    """The tenant of all inputs."""
    return asyncio.run(target.new_tenant())


@pytest.mark.long
def test_hostile_input_is_refused(target: Target, tenant: Tenant) -> None:
    """Every input is answered without blaming the server; both processes stay ready and keep their size."""
    found: dict[str, Figures] = {}

    async def send_all() -> None:
        await target.check(tenant)
        before = target.sizes()
        for kind, count in INPUTS.items():
            found[kind] = await run(partial(KINDS[kind], target, tenant), kind, range(examples(count)), SEED)
            await target.check(tenant)
        await target.check_sizes(before)

    asyncio.run(send_all())
    assert not [failure for figures in found.values() for failure in figures.failures]
    # The inputs reach the ledger, and are refused for many reasons.
    assert found["messages"].statuses["OK"] > examples(30)
    assert len(found["messages"].statuses) >= 5
    assert found["rest"].statuses["200"] > examples(10)
    assert found["http2-server"].statuses["gRPC 0"] > examples(1)
    assert found["http1-gateway"].statuses["400"] > examples(10)


def test_every_method_gets_messages() -> None:
    """Every RPC method is a target, and every binding to REST."""
    assert len(RPC_METHODS) == len(METHODS) + len(("Check", "List", "Watch", "v1", "v1alpha"))
    unbound = {method.name for method in METHODS} - {method.name for method, _ in BINDINGS}
    assert unbound == {"ImportTransactions"}


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_the_same_in_every_run(target: Target, tenant: Tenant, kind: str) -> None:
    """Input N of a kind depends only on the seed and N, so a failure can be sent again."""
    sender = KINDS[kind](target, tenant)
    drawn = [sender.draw(Random(f"{SEED}-{kind}-{number}")) for number in range(20)]
    assert drawn == [sender.draw(Random(f"{SEED}-{kind}-{number}")) for number in range(20)]
    assert len({repr(each) for each in drawn}) > 15


def test_mutations_change_and_keep() -> None:
    """Mutations change most contents, and bytes of them stay."""
    content = bytes(range(200))
    changed = [mutated(content, Random(number)) for number in range(100)]
    assert sum(each != content for each in changed) > 90
    assert sum(content[:8] in each or content[-8:] in each for each in changed) > 80
    parts = [b"a", b"b", b"c"]
    assert sum(reordered(parts, Random(number)) != parts for number in range(100)) > 70


@pytest.mark.parametrize(
    ("kind", "answer", "failure"),
    [
        ("rest", b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n", "rest 0: 500: "),
        ("rest", b"", "rest 0: IncompleteReadError("),
        ("http1-gateway", b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n", "http1-gateway 0: 502: "),
        ("http1-gateway", b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n", None),
    ],
    ids=["500", "no answer", "502", "400"],
)
async def test_fault_of_a_server_is_a_failure(kind: str, answer: bytes, failure: str | None) -> None:
    """An input that gets a 5xx, or no answer at all, is reported with its number; one that is refused is not."""

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        faulty = cast(
            "Target", SimpleNamespace(daybook=SimpleNamespace(ports=Ports(port, port, 0)), require_alive=lambda: None)
        )
        tenant = Tenant("uid", "key", {"name": ("accounts/a",)})
        figures = await run(partial(KINDS[kind], faulty, tenant), kind, range(1), SEED)
    assert figures.failure_count == (failure is not None)
    assert all(each.startswith(failure or "") for each in figures.failures)
