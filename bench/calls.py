"""gRPC calls: single ones whose answers are read, and many whose answers are counted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlencode

import grpc
from daybook.v1.ledger_service_pb2 import ListTransactionsRequest, ListTransactionsResponse
from google.api import annotations_pb2
from google.protobuf.descriptor_pool import Default
from google.protobuf.message import Message

from bench.load import CLIENTS, STREAMS, LoadFailed, framed_size, h2load
from server.transport.addresses import NO_PROXY

LIST = "daybook.v1.Ledger/ListTransactions"
CREATE = "daybook.v1.Ledger/CreateTransaction"
BATCH_CREATE = "daybook.v1.Ledger/BatchCreateTransactions"
PAGE_SIZE = 50
CALL_SECONDS_MAX = 60.0
CALLS_AT_ONCE = 16
# h2load has counted some bytes of answers that it cuts off at its end.
_CUT_OFF_MAX = CLIENTS * STREAMS
_MISSING_MAX = 0.01


def authorization(key: str) -> dict[str, str]:
    """The header that carries an API key."""
    return {"authorization": f"Bearer {key}"}


@dataclass(frozen=True, slots=True)
class Call:
    """A method, its request and its headers."""

    method: str
    requests: tuple[Message, ...]
    """One for each group of callers."""
    headers: Mapping[str, str]

    @classmethod
    def of(cls, method: str, *requests: Message, key: str, **headers: str) -> Call:
        """A call with a key; names of further headers have `_` for `-`."""
        more = {name.replace("_", "-"): value for name, value in headers.items()}
        return cls(method, requests, {**authorization(key), **more})

    def answers(self, port: int) -> list[bytes]:
        """The messages that answer the first request. Raises LoadFailed for a refusal."""
        with grpc.insecure_channel(f"127.0.0.1:{port}", NO_PROXY) as channel:
            return self.answers_on(channel)

    def answers_on(self, channel: grpc.Channel) -> list[bytes]:
        """The same over a channel that is open."""
        # On the wire, a method with one answer is the same as one with a stream of them.
        ask: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(f"/{self.method}")
        request = self.requests[0].SerializeToString()
        try:
            return list(ask(request, metadata=tuple(self.headers.items()), timeout=CALL_SECONDS_MAX))
        except grpc.RpcError as error:
            raise LoadFailed(f"{self.method}: {error}") from None

    def rate(self, port: int, seconds: int, *, clients: int = CLIENTS, streams: int = STREAMS) -> float:
        """Calls answered a second, whatever the answers are."""
        load = h2load(port, self.method, self.requests, seconds, headers=self.headers, clients=clients, streams=streams)
        if load.refused or not load.answers:
            raise LoadFailed(f"{load.refused} of {load.answers} calls of {self.method} were refused")
        return load.rate

    def rate_of_same(self, port: int, seconds: int, answers: Sequence[bytes], *, clients: int = CLIENTS) -> float:
        """Calls answered a second, where every call has the same answer.

        h2load doesn't read the gRPC status, but a refusal has no body: so the sizes of bodies are compared.
        """
        load = h2load(port, self.method, self.requests, seconds, headers=self.headers, clients=clients)
        size = sum(framed_size(answer) for answer in answers)
        at_least, at_most = load.answers * size * (1 - _MISSING_MAX), (load.answers + _CUT_OFF_MAX) * size
        if load.refused or not load.answers or not at_least <= load.body_bytes <= at_most:
            raise LoadFailed(
                f"{load.answers} answers of {self.method}, {load.refused} of them refused, have {load.body_bytes} "
                f"bytes where each has {size}"
            )
        return load.rate


def answer_each(port: int, calls: Iterable[Call]) -> list[bytes]:
    """The single answer of each call, in order. Raises LoadFailed for a refusal."""
    with (
        grpc.insecure_channel(f"127.0.0.1:{port}", NO_PROXY) as channel,
        ThreadPoolExecutor(CALLS_AT_ONCE) as pool,
    ):
        return [answer for (answer,) in pool.map(lambda call: call.answers_on(channel), calls)]


def rate_together(ports: Sequence[int], call: Call, seconds: int, answers: Sequence[bytes]) -> float:
    """Calls answered a second by several servers together, each with its share of the callers."""
    clients = CLIENTS // len(ports)
    with ThreadPoolExecutor(len(ports)) as pool:
        return sum(pool.map(lambda port: call.rate_of_same(port, seconds, answers, clients=clients), ports))


def list_call(key: str, account_id: str, page_token: str = "", page_size: int = PAGE_SIZE) -> Call:
    """The native list of an account."""
    request = ListTransactionsRequest(parent=f"accounts/{account_id}", page_size=page_size, page_token=page_token)
    return Call.of(LIST, request, key=key)


def rest_path(call: Call) -> str:
    """Path and query of a call over REST, by the google.api.http option of its method."""
    method = Default().FindMethodByName(call.method.replace("/", "."))
    path, query = method.GetOptions().Extensions[annotations_pb2.http].get, {}
    for field, value in call.requests[0].ListFields():
        bound, found = re.subn(rf"\{{{field.name}(=[^}}]*)?}}", str(value), path)
        if found:
            path = bound
        else:
            query[field.json_name] = value
    return f"{path}?{urlencode(query)}" if query else path


def read_page(answer: bytes, rows: int = PAGE_SIZE) -> ListTransactionsResponse:
    """A page of the native list. Raises LoadFailed unless it has that many rows."""
    page = ListTransactionsResponse.FromString(answer)
    if len(page.transactions) != rows:
        raise LoadFailed(f"a page of {len(page.transactions)} transactions and not of {rows}")
    return page
