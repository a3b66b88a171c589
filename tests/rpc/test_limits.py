"""Limits of calls over gRPC: a request at a limit is served, and one beyond it is refused.

Other limits are tested with their code: the lengths of all texts, the sizes of metadata and the
number of labels in tests/transport/test_validation.py, page tokens in
tests/transport/test_page_tokens.py, rates in tests/transport/test_limits.py, the poster's queue
in tests/posting/test_poster.py, batches in test_batches.py, the gateway's limits in
tests/facades/test_limits.py. docs/reference/limits.md lists all limits.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
import pytest_asyncio
from daybook.v1.account_pb2 import Account, Company
from daybook.v1.admin_service_pb2 import ImportTransactionsRequest, ListApiKeysRequest
from daybook.v1.ledger_service_pb2 import (
    BatchCreateTransactionsRequest,
    CreateAccountRequest,
    CreateTransactionRequest,
    GetAccountRequest,
    GetBalanceRequest,
    ListAccountsRequest,
    ListLotsRequest,
    ListTransactionsRequest,
    SubmitTransactionsRequest,
    TransferCreditsRequest,
)
from daybook.v1.transaction_pb2 import Transaction
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import ValidationError

from server.app import serving
from server.config import Settings
from server.ledger.instants import SECOND
from server.transport.auth import CREDENTIAL_CHARACTERS_MAX
from server.transport.filters import FILTER_CHARACTERS_MAX
from server.transport.metadata import METADATA_DEPTH_MAX
from server.transport.page_tokens import TOKEN_CHARACTERS_MAX
from server.transport.validation import REQUEST_ID_CHARACTERS_MAX
from tests.support.callers import OWN_CONNECTION, Client, Server
from tests.support.clock import NOON
from tests.support.markers import shares_a_server
from tests.support.refusals import read_refusal

CALLS = 12
"""Number of calls and rows, more than any limit of LOW."""
LOW = Settings(
    port=0,
    message_bytes_max=5000,
    metadata_bytes_max=24_576,
    page_size_max=3,
    batch_size_max=4,
    concurrent_streams_max=2,
)
"""Limits that are low enough to be reached."""


class Limited:
    """A server with low limits, and a caller of it."""

    def __init__(self, client: Client, port: int) -> None:
        self.client = client
        self.port = port


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def limited(shared_server: Server) -> AsyncIterator[Limited]:
    """The module's ledger behind low limits, with CALLS transactions and lots of `acme`, accounts and keys."""
    number = await shared_server.create_tenant("limited")
    admin = await shared_server.client(number, scopes={"admin"})
    await admin.create_account("acme")
    for _ in range(CALLS):
        await admin.post("acme", Transaction.GRANT, "1")
        await admin.create_account(f"more-{_}")
        await shared_server.client(number)
    async with serving(shared_server.book, LOW) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Limited(Client(channel, admin.key), port)


async def verdict_of(call: Any) -> str:
    """OK, or the code of the refusal, followed by the field that it names."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        if "grpc-status-details-bin" not in dict(error.trailing_metadata() or ()):
            return error.code().name
        refusal = read_refusal(error)
        return " ".join((refusal.code.name, *refusal.fields))
    return "OK"


def posting(count: int, **fields: Any) -> list[CreateTransactionRequest]:
    """`count` grants to acme."""
    grant = Transaction(**{"kind": Transaction.GRANT, "category": "test", "amount": "1", **fields})
    return [CreateTransactionRequest(parent="accounts/acme", transaction=grant)] * count


def of_size(size: int) -> CreateAccountRequest:
    """A request of exactly `size` bytes, most of them metadata."""

    def filled(count: int) -> CreateAccountRequest:
        metadata = Struct(fields={"filler": Value(string_value="x" * count)})
        account = Account(kind=Account.SPACE, company=Company(metadata=metadata))
        return CreateAccountRequest(account_id="acme", account=account)

    request = filled(2 * size - filled(size).ByteSize())
    assert request.ByteSize() == size
    return request


@shares_a_server
@pytest.mark.parametrize(
    ("size", "verdict"), [(4999, "ALREADY_EXISTS"), (5000, "ALREADY_EXISTS"), (5001, "RESOURCE_EXHAUSTED")]
)
async def test_size_of_a_message(limited: Limited, size: int, verdict: str) -> None:
    """A request of message_bytes_max bytes is read; a larger one is refused before it is read."""
    call = limited.client.ledger.CreateAccount(of_size(size), metadata=limited.client.metadata)
    assert await verdict_of(call) == verdict


@shares_a_server
async def test_answer_may_exceed_the_limit_of_requests(limited: Limited) -> None:
    """message_bytes_max limits requests only, so an answer may be larger."""
    for _ in range(3):
        await limited.client.post("acme", Transaction.GRANT, "1", receipt_uri="x" * 2048)
    call = limited.client.raw_call(
        "ListTransactions", ListTransactionsRequest(parent="accounts/acme").SerializeToString()
    )
    assert len(await call) > LOW.message_bytes_max


@shares_a_server
@pytest.mark.parametrize(("size", "is_accepted"), [(20_000, True), (24_000, True), (50_000, False)])
async def test_size_of_metadata(limited: Limited, size: int, is_accepted: bool) -> None:
    """Metadata up to metadata_bytes_max is accepted, twice as much is refused; in between gRPC refuses at random."""
    metadata = (*limited.client.metadata, ("x-filler", "x" * size))
    call = limited.client.ledger.GetAccount(GetAccountRequest(name="accounts/acme"), metadata=metadata)
    assert await verdict_of(call) == ("OK" if is_accepted else "RESOURCE_EXHAUSTED")


@shares_a_server
@pytest.mark.parametrize(
    ("page_size", "row_count"), [(0, 3), (1, 1), (2, 2), (3, 3), (4, 3), (1000, 3), (2**31 - 1, 3)]
)
async def test_size_of_a_page(limited: Limited, page_size: int, row_count: int) -> None:
    """A page has at most page_size_max rows, also by default; a larger page_size is no error."""
    ledger, admin, metadata = limited.client.ledger, limited.client.admin, limited.client.metadata
    accounts = await ledger.ListAccounts(ListAccountsRequest(page_size=page_size), metadata=metadata)
    rows = await ledger.ListTransactions(
        ListTransactionsRequest(parent="accounts/acme", page_size=page_size), metadata=metadata
    )
    lots = await ledger.ListLots(ListLotsRequest(parent="accounts/acme", page_size=page_size), metadata=metadata)
    keys = await admin.ListApiKeys(ListApiKeysRequest(page_size=page_size), metadata=metadata)
    found = [len(each) for each in (accounts.accounts, rows.transactions, lots.lots, keys.api_keys)]
    assert found == [row_count] * 4


@shares_a_server
@pytest.mark.parametrize(
    ("count", "verdict"), [(1, "OK"), (4, "OK"), (5, "INVALID_ARGUMENT requests"), (0, "INVALID_ARGUMENT requests")]
)
async def test_size_of_a_batch(limited: Limited, count: int, verdict: str) -> None:
    """A batch of either kind has 1 to batch_size_max requests."""
    ledger, metadata = limited.client.ledger, limited.client.metadata
    batch = BatchCreateTransactionsRequest(parent="accounts/acme", requests=posting(count))
    submitted = SubmitTransactionsRequest(parent="accounts/acme", requests=posting(count))
    assert await verdict_of(ledger.BatchCreateTransactions(batch, metadata=metadata)) == verdict
    assert await verdict_of(ledger.SubmitTransactions(submitted, metadata=metadata)) == verdict


@shares_a_server
@pytest.mark.parametrize(("count", "verdict"), [(4, "OK"), (5, "INVALID_ARGUMENT items")])
async def test_size_of_a_message_of_an_import(limited: Limited, count: int, verdict: str) -> None:
    """A message of an import has at most batch_size_max items; a stream has any number of messages."""
    (request,) = posting(1)
    item = ImportTransactionsRequest.Item(
        parent=request.parent, transaction=request.transaction, create_time=Timestamp(seconds=NOON // SECOND)
    )
    call = limited.client.admin.ImportTransactions(
        iter([ImportTransactionsRequest(items=[item] * 4), ImportTransactionsRequest(items=[item] * count)]),
        metadata=limited.client.metadata,
    )
    assert await verdict_of(call) == verdict


@shares_a_server
async def test_concurrent_calls_of_a_connection(limited: Limited) -> None:
    """A connection runs at most concurrent_streams_max calls at once; the next one waits until one ends."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{limited.port}", options=OWN_CONNECTION) as channel:
        crowd = Client(channel, limited.client.key)
        imports: list[Any] = []
        for _ in range(LOW.concurrent_streams_max):
            imports.append(crowd.admin.ImportTransactions(metadata=crowd.metadata))
            await imports[-1].write(ImportTransactionsRequest())
            # The call has begun once its first message is sent.
            await imports[-1].wait_for_connection()
        waiting = asyncio.ensure_future(crowd.balance())
        # Calls of another connection are served meanwhile, however many.
        for _ in range(CALLS):
            await limited.client.balance()
        assert not waiting.done()
        await imports[0].done_writing()
        await imports[0]
        assert (await waiting).name == "accounts/acme/balance"
        await imports[1].done_writing()
        await imports[1]


@shares_a_server
@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
@pytest.mark.parametrize(("length", "verdict"), [(0, "OK"), (1, "UNAUTHENTICATED")])
async def test_length_of_a_credential(shared_client: Client, header: str, length: int, verdict: str) -> None:
    """A credential of 4,096 characters, white space included, is checked; a longer one is refused."""
    scheme = "Bearer " if header == "authorization" else ""
    text = f"{scheme}{shared_client.key.rjust(CREDENTIAL_CHARACTERS_MAX - len(scheme) + length)}"
    assert len(text) == CREDENTIAL_CHARACTERS_MAX + length
    call = shared_client.ledger.GetBalance(GetBalanceRequest(name="accounts/acme/balance"), metadata=((header, text),))
    assert await verdict_of(call) == verdict


def nested(depth: int, *, in_lists: bool = False) -> Struct:
    """A Struct of `depth` levels, the inner ones Structs or lists."""
    value: Any = 1
    for _ in range(depth - 1):
        value = [value] if in_lists else {"in": value}
    struct = Struct()
    struct.update({"in": value})
    return struct


def listing(**fields: Any) -> ListTransactionsRequest:
    """A list of acme's transactions."""
    return ListTransactionsRequest(parent="accounts/acme", **fields)


def spaced(size: int) -> str:
    """A filter of `size` characters."""
    return "kind = GRANT".ljust(size)


LIMITS: dict[str, tuple[Message, Message, str]] = {
    "filter": (
        listing(filter=spaced(FILTER_CHARACTERS_MAX)),
        listing(filter=spaced(FILTER_CHARACTERS_MAX + 1)),
        "filter",
    ),
    "values of a filter": (
        listing(filter=" OR ".join(f"category = c{n}" for n in range(16))),
        listing(filter=" OR ".join(f"category = c{n}" for n in range(17))),
        "filter",
    ),
    "request_id": (
        CreateTransactionRequest(
            parent="accounts/acme", transaction=posting(1)[0].transaction, request_id="x" * REQUEST_ID_CHARACTERS_MAX
        ),
        CreateTransactionRequest(
            parent="accounts/acme",
            transaction=posting(1)[0].transaction,
            request_id="x" * (REQUEST_ID_CHARACTERS_MAX + 1),
        ),
        "request_id",
    ),
    "account_id": (
        CreateAccountRequest(account_id="a" * 128, account=Account(kind=Account.SPACE)),
        CreateAccountRequest(account_id="a" * 129, account=Account(kind=Account.SPACE)),
        "account_id",
    ),
    "depth of metadata": (
        posting(1, metadata=nested(METADATA_DEPTH_MAX))[0],
        posting(1, metadata=nested(METADATA_DEPTH_MAX + 1))[0],
        "transaction.metadata",
    ),
}
"""A request at a limit, a request beyond it, and the field that its refusal names."""


@shares_a_server
@pytest.mark.parametrize("limit", LIMITS)
async def test_request_beyond_a_limit_is_refused(shared_client: Client, limit: str) -> None:
    """A request at a limit is served; a request beyond it is refused with the field."""
    below, above, field = LIMITS[limit]
    ledger, metadata = shared_client.ledger, shared_client.metadata
    methods: dict[type[Message], Callable[..., Any]] = {
        ListTransactionsRequest: ledger.ListTransactions,
        CreateTransactionRequest: ledger.CreateTransaction,
        CreateAccountRequest: ledger.CreateAccount,
    }
    method = methods[type(below)]
    assert await verdict_of(method(below, metadata=metadata)) == "OK"
    assert await verdict_of(method(above, metadata=metadata)) == f"INVALID_ARGUMENT {field}"


@shares_a_server
@pytest.mark.parametrize("in_lists", [False, True])
async def test_deepest_metadata_can_be_read(shared_client: Client, in_lists: bool) -> None:
    """Metadata of the greatest depth can be read in every answer that includes it."""
    deepest = nested(METADATA_DEPTH_MAX, in_lists=in_lists)
    account_id = f"deep-{in_lists}"
    await shared_client.create_account(account_id, company=Company(metadata=deepest))
    await shared_client.post(account_id, Transaction.GRANT, "1", metadata=deepest)
    await shared_client.ledger.TransferCredits(
        TransferCreditsRequest(
            name=f"accounts/{account_id}", destination="accounts/acme", amount="0.5", metadata=deepest
        ),
        metadata=shared_client.metadata,
    )
    submitted = SubmitTransactionsRequest(parent="accounts/acme", requests=posting(1, metadata=deepest))
    answer = await shared_client.ledger.SubmitTransactions(submitted, metadata=shared_client.metadata)
    assert answer.results[0].transaction.metadata == deepest
    assert [row.metadata for row in await shared_client.history(account_id)] == [deepest] * 2
    accounts = await shared_client.ledger.ListAccounts(ListAccountsRequest(), metadata=shared_client.metadata)
    assert deepest in [each.company.metadata for each in accounts.accounts]


@shares_a_server
@pytest.mark.parametrize("length", [TOKEN_CHARACTERS_MAX, TOKEN_CHARACTERS_MAX + 1, 100_000])
async def test_length_of_a_page_token(shared_client: Client, length: int) -> None:
    """A page token that is too long is refused like any invalid one."""
    call = shared_client.ledger.ListTransactions(listing(page_token="A" * length), metadata=shared_client.metadata)
    assert await verdict_of(call) == "INVALID_ARGUMENT page_token"


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("message_bytes_max", 1024, 64 * 1024 * 1024),
        ("metadata_bytes_max", 24_576, 1024 * 1024),
        ("page_size_max", 1, 1000),
        ("batch_size_max", 1, 1000),
        ("concurrent_streams_max", 1, 100_000),
        ("gateway_rate_limit_requests_per_second", 0, 1_000_000),
        ("gateway_rate_limit_burst", 1, 10_000_000),
    ],
)
def test_setting_of_a_limit_is_bounded(name: str, least: int, most: int) -> None:
    """A limit can be set only between its least and its greatest value, which the contract's own limits bound."""
    for value in (least, most):
        assert getattr(Settings(**{name: value}), name) == value  # type: ignore[arg-type]
    for value in (least - 1, most + 1):
        with pytest.raises(ValidationError, match=name):
            Settings(**{name: value})  # type: ignore[arg-type]


NARROW = Settings(port=0, text_characters_max=64)
"""A limit on every text of a request, below the limits of the contract."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def narrow(shared_server: Server) -> AsyncIterator[Client]:
    """A caller of the module's ledger, behind a limit on all texts."""
    admin = await shared_server.client(await shared_server.create_tenant("narrow"), scopes={"admin"})
    await admin.create_account("acme")
    async with serving(shared_server.book, NARROW) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Client(channel, admin.key)


async def history(item: CreateTransactionRequest) -> AsyncIterator[ImportTransactionsRequest]:
    """An import of one transaction."""
    past = ImportTransactionsRequest.Item(
        parent=item.parent, transaction=item.transaction, create_time=Timestamp(seconds=NOON // SECOND)
    )
    yield ImportTransactionsRequest(items=[past])


@shares_a_server
@pytest.mark.parametrize(("length", "is_accepted"), [(64, True), (65, False)])
@pytest.mark.parametrize("letter", ["x", "\u00e9"])
async def test_length_of_any_text(narrow: Client, length: int, is_accepted: bool, letter: str) -> None:
    """A text of text_characters_max characters is accepted in every field; a longer one is refused with its path."""
    text = letter * length
    ledger, metadata = narrow.ledger, narrow.metadata
    (described,) = posting(1, description=text)
    (short,) = posting(1)
    calls = {
        "transaction.description": ledger.CreateTransaction(described, metadata=metadata),
        "transaction.labels.location": ledger.CreateTransaction(
            posting(1, labels={"location": text})[0], metadata=metadata
        ),
        "requests[1].transaction.description": ledger.BatchCreateTransactions(
            BatchCreateTransactionsRequest(parent="accounts/acme", requests=[short, described]), metadata=metadata
        ),
        "account.company.notes": ledger.CreateAccount(
            CreateAccountRequest(
                account_id=f"{length}-{ord(letter)}",
                account=Account(kind=Account.COMPANY, company=Company(title="x", notes=text)),
            ),
            metadata=metadata,
        ),
        "items[0].transaction.description": narrow.admin.ImportTransactions(history(described), metadata=metadata),
    }
    for place, call in calls.items():
        assert await verdict_of(call) == ("OK" if is_accepted else f"INVALID_ARGUMENT {place}")


@shares_a_server
async def test_length_of_texts_inside_metadata(narrow: Client) -> None:
    """The texts in a Struct have no limit, since the Struct as a whole has one."""
    struct = Struct()
    struct["long"] = "x" * 1000
    (request,) = posting(1, metadata=struct)
    assert await verdict_of(narrow.ledger.CreateTransaction(request, metadata=narrow.metadata)) == "OK"
