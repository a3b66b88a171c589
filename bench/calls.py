"""gRPC calls of the bench: single calls, whose responses are read, and loads, whose responses are counted."""

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
# h2load counts bytes of responses that are incomplete when it ends.
_CUT_OFF_MAX = CLIENTS * STREAMS
_MISSING_MAX = 0.01


def authorization(key: str) -> dict[str, str]:
    """Returns the header with an API key."""
    return {"authorization": f"Bearer {key}"}


@dataclass(frozen=True, slots=True)
class Call:
    """A method, its request and its headers."""

    method: str
    requests: tuple[Message, ...]
    """One request for each group of callers."""
    headers: Mapping[str, str]

    @classmethod
    def of(cls, method: str, *requests: Message, key: str, **headers: str) -> Call:
        """Returns a call with an API key and more headers, whose names have `_` for `-`."""
        more = {name.replace("_", "-"): value for name, value in headers.items()}
        return cls(method, requests, {**authorization(key), **more})

    def answers(self, port: int) -> list[bytes]:
        """Makes the call with the first request. Returns the response messages. Raises LoadFailed if it fails."""
        with grpc.insecure_channel(f"127.0.0.1:{port}", NO_PROXY) as channel:
            return self.answers_on(channel)

    def answers_on(self, channel: grpc.Channel) -> list[bytes]:
        """Makes the call over an open channel, like `answers`."""
        # On the wire, a unary response looks like a stream of one response.
        method: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(f"/{self.method}")
        request = self.requests[0].SerializeToString()
        try:
            return list(method(request, metadata=tuple(self.headers.items()), timeout=CALL_SECONDS_MAX))
        except grpc.RpcError as error:
            raise LoadFailed(f"{self.method}: {error}") from None

    def rate(self, port: int, seconds: int, *, clients: int = CLIENTS, streams: int = STREAMS) -> float:
        """Returns the answered calls per second. The responses are not checked."""
        load = h2load(port, self.method, self.requests, seconds, headers=self.headers, clients=clients, streams=streams)
        if load.refused or not load.answers:
            raise LoadFailed(f"{load.refused} of {load.answers} calls of {self.method} were refused")
        return load.rate

    def rate_of_same(self, port: int, seconds: int, answers: Sequence[bytes], *, clients: int = CLIENTS) -> float:
        """Returns the answered calls per second, of calls that all have the same response.

        h2load doesn't read the gRPC status, but an error has no body, so the sizes of the bodies are compared.
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
    """Makes the calls concurrently. Returns their responses in order. Raises LoadFailed if a call fails."""
    with (
        grpc.insecure_channel(f"127.0.0.1:{port}", NO_PROXY) as channel,
        ThreadPoolExecutor(CALLS_AT_ONCE) as pool,
    ):
        return [answer for (answer,) in pool.map(lambda call: call.answers_on(channel), calls)]


def rate_together(ports: Sequence[int], call: Call, seconds: int, answers: Sequence[bytes]) -> float:
    """Returns the answered calls per second of several servers, among which the callers are divided."""
    clients = CLIENTS // len(ports)
    with ThreadPoolExecutor(len(ports)) as pool:
        return sum(pool.map(lambda port: call.rate_of_same(port, seconds, answers, clients=clients), ports))


def list_call(key: str, account_id: str, page_token: str = "", page_size: int = PAGE_SIZE) -> Call:
    """Returns the call that lists an account's transactions."""
    request = ListTransactionsRequest(parent=f"accounts/{account_id}", page_size=page_size, page_token=page_token)
    return Call.of(LIST, request, key=key)


def rest_path(call: Call) -> str:
    """Returns the REST path and query of a call, from the google.api.http option of its method."""
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
    """Parses a page of the native list. Raises LoadFailed unless it has `rows` rows."""
    page = ListTransactionsResponse.FromString(answer)
    if len(page.transactions) != rows:
        raise LoadFailed(f"a page of {len(page.transactions)} transactions and not of {rows}")
    return page
