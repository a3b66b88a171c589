"""Tenants: what somebody else holds is as unknown as what isn't there, by every method and every REST path.

There are two worlds. In the full one a stranger holds things of every kind; in the bare one
those don't exist, and all else is the same to the bit: clock, randomness, the caller's own
books. A caller asks both for the stranger's things, in every field that can name one. Each
answer must be the same to the byte, status, headers and trailers included, so that it holds
no row of the stranger's and not even whether there is one. The stranger's books are the same
afterwards. How long an answer takes is not compared.

What the contracts themselves let through, and so both worlds share:

- An account's `number` counts the accounts of all tenants (account.proto). Both worlds have as many.
- A page token that was sealed for another tenant is PAGE_TOKEN_MISMATCH, where a made-up one is
  PAGE_TOKEN_INVALID (ListTransactionsRequest.page_token). It tells only whoever holds a token
  that it is one, which they could not guess. Both worlds seal with the same key.
"""

from __future__ import annotations

import asyncio
import json
import re
from base64 import b64encode
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeAlias, cast
from urllib.parse import quote, urlencode
from uuid import NAMESPACE_URL, uuid5

import grpc
import pytest
import pytest_asyncio
from daybook.v1.account_pb2 import Account, Company, User
from daybook.v1.admin_service_pb2 import (
    CreateApiKeyRequest,
    ImportTransactionsRequest,
    ListApiKeysRequest,
    RevokeApiKeyRequest,
    RotateApiKeyRequest,
    VerifyAccountsRequest,
)
from daybook.v1.api_key_pb2 import ApiKey
from daybook.v1.ledger_service_pb2 import (
    BatchCreateTransactionsRequest,
    CreateAccountRequest,
    CreateTransactionRequest,
    GetAccountRequest,
    GetBalanceRequest,
    GetTransactionRequest,
    ListAccountsRequest,
    ListLotsRequest,
    ListTransactionsRequest,
    RefundTransactionRequest,
    SubmitTransactionsRequest,
    TransferCreditsRequest,
    UpdateAccountRequest,
)
from daybook.v1.transaction_pb2 import Booking, EventTicket, Order, Transaction, Usage
from google.api.annotations_pb2 import http
from google.api.http_pb2 import HttpRule
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.descriptor_pool import Default
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import select

from server.app import FACADES, SERVICES, serving
from server.book import Book, open_book
from server.config import Settings
from server.facades.spacebring import NETWORK_HEADER
from server.ledger.instants import SECOND
from server.store.tables import metadata as schema
from server.transport.validation import CHARACTERS_MAX
from server.vendors import spacebring
from tests.support.callers import Client, Server
from tests.support.clock import NOON, Clock
from tests.support.gateways import gateway_before
from tests.support.http_client import send
from tests.support.methods import facade_requests

Requests: TypeAlias = Sequence[Message]
"""What is sent in one call: one message, or several where the method takes a stream."""
Answer: TypeAlias = tuple[object, ...]

WORD = "zq7"
"""Every name of the stranger's has it."""
PRIVATE = "q9private"
"""Whatever else the stranger wrote down has it, and no caller ever sends it."""
GRANTED = "31415.926535"
"""What the stranger was given, and nobody else. What is left of it has the same fraction."""
SECRETS = (PRIVATE, ".926535", '"balance":31415,')
"""What no other answer may have. The last is Dreadnode's balance, in whole credits."""
TOKEN_FIELDS = ("page_token", "cursor", "next_page_token")
EVERYTHING = {"admin"}


@dataclass
class Names:
    """What somebody holds, by the names of it."""

    network: str
    account: str
    other: str
    """Another account."""
    charge: str
    """The name of a transaction that can be refunded."""
    lot: str
    api_key: str
    key_string: str
    request_id: str
    tokens: list[str] = field(default_factory=list)
    """A page token of each list."""


@dataclass(frozen=True)
class Caller:
    """Somebody with a key, their own things, and those that are none of their business."""

    title: str
    key: str
    own: Names
    theirs: Names


@dataclass(frozen=True)
class World:
    """A ledger, its server, and a gateway before it."""

    book: Book
    channel: grpc.aio.Channel
    origin: str
    callers: Sequence[Caller]
    strangers: Sequence[Client]
    """Who may see what is compared; only in the full world."""


def transaction(word: str, kind: Transaction.Kind.ValueType, category: str, amount: str, **fields: Any) -> Transaction:
    """A transaction that says a word wherever it says anything."""
    return Transaction(
        kind=kind,
        category=category,
        amount=amount,
        **{
            "description": word,
            "owner": User(id=word, name=word),
            "creator": User(id=word, name=word, email=word, membership=word),
            "metadata": Struct(fields={word: Value(string_value=word)}),
            "receipt_uri": word,
            **fields,
        },
    )


async def furnish(client: Client, prefix: str, network: str, word: str, granted: str) -> Names:
    """Gives a tenant two accounts with things of every kind; answers with their names."""
    account, other, request_id = f"{prefix}-space", f"{prefix}-other", f"{prefix}-request"
    parent = f"accounts/{account}"
    company = Company(title=word, legal_name=word, tax_id=word, notes=word)
    await client.create_account(account, kind=Account.COMPANY, display_name=word, company=company)
    await client.create_account(other, kind=Account.USER, display_name=word, user=User(id=word, name=word))
    labels = {"location": f"{prefix}-location", "membership": f"{prefix}-membership", "company": account}

    async def post(kind: Transaction.Kind.ValueType, category: str, amount: str, **fields: Any) -> Transaction:
        message = transaction(word, kind, category, amount, labels=labels, **fields)
        return await client.ledger.CreateTransaction(
            CreateTransactionRequest(parent=parent, transaction=message), metadata=client.metadata
        )

    await post(Transaction.GRANT, "purchase", granted)
    await post(Transaction.GRANT, "credit_package", "7", ttl=Duration(seconds=86_400))
    charge = await post(Transaction.CHARGE, "inference", "-2", usage=Usage(model=word, input_tokens=5))
    await post(Transaction.CHARGE, "computing", "-1", usage=Usage(model=word))
    await post(Transaction.CHARGE, "ai_chat", "-1")
    await post(Transaction.CHARGE, "booking", "-1", booking=Booking(id=word))
    await post(Transaction.CHARGE, "order", "-1", order=Order(id=word))
    await post(Transaction.CHARGE, "event_ticket", "-1", event_ticket=EventTicket(id=word))
    await client.ledger.RefundTransaction(
        RefundTransactionRequest(name=charge.name, amount="1", request_id=request_id), metadata=client.metadata
    )
    await client.ledger.TransferCredits(
        TransferCreditsRequest(name=parent, destination=f"accounts/{other}", amount="1", description=word),
        metadata=client.metadata,
    )
    lots = await client.ledger.ListLots(ListLotsRequest(parent=parent, page_size=1), metadata=client.metadata)
    made = await client.admin.CreateApiKey(
        CreateApiKeyRequest(api_key=ApiKey(display_name=word, scopes=["admin"], account=parent)),
        metadata=client.metadata,
    )
    pages = (
        await client.ledger.ListTransactions(
            ListTransactionsRequest(parent=parent, page_size=1), metadata=client.metadata
        ),
        await client.ledger.ListTransactions(
            ListTransactionsRequest(parent="accounts/-", page_size=1), metadata=client.metadata
        ),
        await client.ledger.ListAccounts(ListAccountsRequest(page_size=1), metadata=client.metadata),
        await client.admin.ListApiKeys(ListApiKeysRequest(page_size=1), metadata=client.metadata),
        lots,
    )
    tokens = [page.next_page_token for page in pages]
    assert all(tokens), "each list has another page"
    return Names(
        network=network,
        account=account,
        other=other,
        charge=charge.name,
        lot=lots.lots[0].name,
        api_key=made.api_key.name,
        key_string=made.key_string,
        request_id=request_id,
        tokens=tokens,
    )


async def populate(server: Server, *, is_full: bool) -> tuple[list[Caller], list[Client]]:
    """The callers' own things first, so that they are the same in both worlds; then the strangers'."""
    mine, shared, alien = [await server.create_tenant(slug) for slug in ("mine", "shared", "alien")]
    networks = {slug: str(uuid5(NAMESPACE_URL, slug)) for slug in ("mine", "shared", "alien")}
    owner, landlord = await server.client(mine, scopes=EVERYTHING), await server.client(shared, scopes=EVERYTHING)
    own = await furnish(owner, "own", networks["mine"], "own", "1000")
    home = await furnish(landlord, "own", networks["shared"], "own", "1000")
    lodger = await server.client(shared, account_id=home.account, scopes=EVERYTHING)
    stranger = await server.client(alien, scopes=EVERYTHING)
    strangers = [stranger, landlord]
    if is_full:
        theirs = await furnish(stranger, WORD, networks["alien"], PRIVATE, GRANTED)
        neighbours = await furnish(landlord, WORD, networks["shared"], PRIVATE, GRANTED)
    else:
        for client in strangers:
            for name in ("nobody", "nothing"):
                await client.create_account(name)
        # Never looked at: what is asked for is what the full world holds.
        theirs = neighbours = own
    return [
        Caller("another tenant", owner.key, own, theirs),
        Caller("another account", lodger.key, home, neighbours),
    ], strangers


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worlds(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[World, World]]:
    """The full world and the bare one."""
    made = []
    async with AsyncExitStack() as stack:
        for is_full in (True, False):
            folder = tmp_path_factory.mktemp("world")
            database_url = f"sqlite+aiosqlite:///{folder}/daybook.db"
            async with (
                open_book(database_url, Clock(), Random(1).randbytes) as book,
                serving(book, Settings(port=0)) as port,
                grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
            ):
                callers, strangers = await populate(Server(book, channel), is_full=is_full)
            # From here on both have seen the same randomness.
            book = await stack.enter_async_context(open_book(database_url, Clock(NOON + SECOND), Random(2).randbytes))
            port = await stack.enter_async_context(serving(book, Settings(port=0)))
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
            origin = await asyncio.to_thread(stack.enter_context, gateway_before(folder, port))
            strangers = [Client(channel, each.key) for each in strangers]
            made.append(World(book, channel, origin, callers, strangers))
        yield made[0], made[1]


def methods() -> dict[str, MethodDescriptor]:
    """Every method of every service, by its full name, as the contracts have it."""
    services = [Default().FindServiceByName(service) for service in SERVICES]
    found = {f"{service.full_name}/{method.name}": method for service in services for method in service.methods}
    # The other way round, so that a key is rotated before it is revoked.
    return dict(sorted(found.items(), reverse=True))


def base_requests(own: Names) -> dict[str, Requests]:
    """A request for each method that its caller may make, about their own things.

    A method that is missing here fails test_every_method_is_asked.
    """
    parent, post = f"accounts/{own.account}", transaction("own", Transaction.CHARGE, "ai_chat", "-1")
    created = CreateTransactionRequest(parent=parent, transaction=post)
    ledger, admin = "daybook.v1.Ledger", "daybook.v1.Admin"
    return {
        f"{ledger}/CreateAccount": [CreateAccountRequest(account_id="new", account=Account(kind=Account.OTHER))],
        f"{ledger}/GetAccount": [GetAccountRequest(name=parent)],
        f"{ledger}/ListAccounts": [ListAccountsRequest()],
        f"{ledger}/UpdateAccount": [UpdateAccountRequest(account=Account(name=parent, display_name="new"))],
        f"{ledger}/CreateTransaction": [created],
        f"{ledger}/BatchCreateTransactions": [
            BatchCreateTransactionsRequest(parent="accounts/-", requests=[created, created])
        ],
        f"{ledger}/SubmitTransactions": [SubmitTransactionsRequest(parent="accounts/-", requests=[created, created])],
        f"{ledger}/RefundTransaction": [RefundTransactionRequest(name=own.charge, amount="0.01")],
        f"{ledger}/TransferCredits": [
            TransferCreditsRequest(name=parent, destination=f"accounts/{own.other}", amount="0.01")
        ],
        f"{ledger}/GetTransaction": [GetTransactionRequest(name=own.charge)],
        f"{ledger}/ListTransactions": [ListTransactionsRequest(parent="accounts/-", page_size=1000)],
        f"{ledger}/ListLots": [ListLotsRequest(parent=parent)],
        f"{ledger}/GetBalance": [GetBalanceRequest(name=f"{parent}/balance")],
        f"{admin}/ImportTransactions": [
            ImportTransactionsRequest(
                items=[
                    ImportTransactionsRequest.Item(
                        parent=parent, transaction=post, create_time=Timestamp(seconds=NOON // SECOND + 1)
                    )
                ]
            )
        ],
        f"{admin}/VerifyAccounts": [VerifyAccountsRequest()],
        f"{admin}/CreateApiKey": [CreateApiKeyRequest(api_key=ApiKey(scopes=["accounts"], account=parent))],
        f"{admin}/ListApiKeys": [ListApiKeysRequest()],
        f"{admin}/RevokeApiKey": [RevokeApiKeyRequest(name=own.api_key)],
        f"{admin}/RotateApiKey": [RotateApiKeyRequest(name=own.api_key)],
        **{
            f"{method.containing_service.full_name}/{method.name}": [request]
            for method, request in facade_requests(own.account)
        },
    }


def their_values(name: str, theirs: Names) -> Iterable[str]:
    """What a field of some name is set to, to name what is the stranger's. A field that isn't known gets an id."""
    account = f"accounts/{theirs.account}"
    match name:
        case "name" | "refund_of" | "transfer_peer":
            return account, f"{account}/balance", theirs.charge, theirs.lot, theirs.api_key
        case "parent" | "destination" | "account.name" | "api_key.account":
            return account, f"accounts/{theirs.other}"
        case _ if name in TOKEN_FIELDS:
            return theirs.tokens
        case "request_id":
            return (theirs.request_id,)
        case "filter":
            return [
                f'labels.{label} = "{value}"'
                for label, value in (
                    ("company", theirs.account),
                    ("location", f"{WORD}-location"),
                    ("membership", f"{WORD}-membership"),
                )
            ]
        case "account":
            return account, theirs.account
    return theirs.account, theirs.other


def texts(descriptor: Descriptor) -> Iterator[list[tuple[str, FieldDescriptor]]]:
    """Every text in a message of the project's own, at any depth, by its path.

    One by one, except those of a message that is kept as a whole.
    """
    for each in descriptor.fields:
        inside = each.message_type
        if each.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            yield [(each.name, each)]
        elif inside is not None and inside.full_name.startswith("daybook."):
            found = [[(f"{each.name}.{path}", text) for path, text in group] for group in texts(inside)]
            yield from [[text for group in found for text in group]] if inside.full_name in KEPT else found


def put(message: Any, path: str, value: str) -> None:
    """Sets a text at a path; all elements of what is repeated get it, and one that is empty gets one."""
    name, _, rest = path.partition(".")
    descriptor = message.DESCRIPTOR.fields_by_name[name]
    if not rest:
        if descriptor.is_repeated:
            getattr(message, name)[:] = [value]
        else:
            setattr(message, name, value)
        return
    inside = getattr(message, name)
    if not descriptor.is_repeated:
        put(inside, rest, value)
    elif descriptor.message_type.GetOptions().map_entry:
        inside["company"] = value
    else:
        put(inside[-1] if inside else inside.add(), rest, value)


PATHS = ("account.name", "api_key.account")
"""Texts that are known by their path, since others of the same name mean something else."""
KEPT = CHARACTERS_MAX.keys() - {Account.DESCRIPTOR.full_name, ApiKey.DESCRIPTOR.full_name}
"""Messages that are kept as they are, or refused where they are output only, and looked up nowhere."""
FORMATTED = ("amount", "category", "country_code", "cost_usd", "key")
"""Texts in them that can't name anything, and would have all of it refused."""


def probes(method: MethodDescriptor, base: Requests, theirs: Names) -> Iterator[tuple[str, Requests]]:
    """The request as it is, and once for each text in it and each thing of the stranger's that it can name."""
    yield "", base
    for group in texts(method.input_type):
        free = [(path, text) for path, text in group if len(group) == 1 or text.name not in FORMATTED]
        values = [their_values(path if path in PATHS else text.name, theirs) for path, text in free]
        for some in [values] if len(group) > 1 else zip(*values, strict=True):
            changed = [type(each).FromString(each.SerializeToString()) for each in base]
            for (path, _), value in zip(free, some, strict=True):
                put(changed[-1], path, value if isinstance(value, str) else value[0])
            yield free[0][0], changed


async def ask(world: World, method: str, requests: Requests, metadata: Sequence[tuple[str, str]]) -> Answer:
    """All that comes back over gRPC. On the wire every method is a stream both ways."""
    multicallable: Any = world.channel.stream_stream(f"/{method}")
    call = multicallable(iter([each.SerializeToString() for each in requests]), metadata=metadata)
    messages: list[bytes] = []
    with suppress(grpc.aio.AioRpcError):
        messages.extend([message async for message in call])
    return (
        await call.code(),
        await call.details(),
        tuple(await call.initial_metadata() or ()),
        tuple(await call.trailing_metadata() or ()),
        tuple(messages),
    )


def bindings(method: MethodDescriptor) -> list[HttpRule]:
    """Every REST path of a method."""
    rule: HttpRule = method.GetOptions().Extensions[http]
    return [each for each in (rule, *rule.additional_bindings) if each.WhichOneof("pattern")]


@dataclass(frozen=True)
class RestRequest:
    """A request over REST."""

    method: str
    target: str
    body: bytes


def transcode(rule: HttpRule, request: Message) -> RestRequest | None:
    """A request the way REST says it; None where the path can't say it."""
    verb = cast("str", rule.WhichOneof("pattern"))
    template: str = getattr(rule, verb)
    fields = MessageToDict(request, preserving_proto_field_name=True)
    target = template
    for variable, path, pattern in re.findall(r"(\{([a-z_.]+)=?([^}]*)\})", template):
        *outer, last = path.split(".")
        owner: Any = fields
        for name in outer:
            owner = owner[name]
        value = str(owner.pop(last, ""))
        if not re.fullmatch(re.escape(pattern or "*").replace(r"\*", "[^/]+"), value):
            return None
        target = target.replace(variable, quote(value))
    body: object = None
    if rule.body == "*":
        body, fields = fields, {}
    elif rule.body:
        body = fields.pop(rule.body, {})
    json_names = {each.name: each.json_name for each in request.DESCRIPTOR.fields}
    query = urlencode([(json_names[name], value) for name, value in fields.items()], doseq=True)
    return RestRequest(
        verb.upper(), target + (f"?{query}" if query else ""), b"" if body is None else json.dumps(body).encode()
    )


def send_rest(world: World, request: RestRequest, headers: dict[str, str]) -> Answer:
    """All that comes back over REST but the time of day."""
    more = {"content-type": "application/json"} if request.body else {}
    answer = send(
        world.origin,
        request.target,
        method=request.method,
        # What would differ by itself between two gateways.
        headers={"host": "daybook.example", "x-request-id": "same", **headers, **more},
        body=request.body,
    )
    shown = tuple((name, value) for name, value in answer.headers if name != "date")
    return answer.status, shown, answer.body


def headers_of(method: str, caller: Caller) -> Iterator[dict[str, str]]:
    """With what headers a caller asks: where one of them names a tenant, also with the stranger's."""
    credential = {"authorization": f"Bearer {caller.key}"}
    if not method.startswith(spacebring.VENDOR.service):
        yield credential
        return
    for network in (caller.own.network, caller.theirs.network):
        yield {**credential, NETWORK_HEADER: network}


async def strangers_books(book: Book) -> dict[str, list[str]]:
    """Every row that is about what the strangers hold."""
    async with book.database.primary.snapshot() as connection:
        rows = {
            table.name: [row._asdict() for row in await connection.execute(select(table))]
            for table in schema.sorted_tables
        }
    (tenant,) = [row["number"] for row in rows["tenants"] if row["slug"] == "alien"]
    # The owner may have an account of the same id.
    (owner,) = [row["number"] for row in rows["tenants"] if row["slug"] == "mine"]
    numbers = {
        row["number"] for row in rows["accounts"] if row["id"].startswith(WORD) and row["tenant_number"] != owner
    }
    keys = {row["id"] for row in rows["api_keys"] if row["account_number"] in numbers or row["tenant_number"] == tenant}
    theirs = {"account_number": numbers, "tenant_number": {tenant}, "key_id": keys}
    numbered = {"accounts": numbers, "tenants": {tenant}}
    return {
        table: sorted(
            repr(row)
            for row in each
            if any(row.get(column) in values for column, values in theirs.items())
            or row.get("number") in numbered.get(table, ())
        )
        for table, each in rows.items()
    }


def test_every_method_is_asked() -> None:
    """The table of requests has each method of the contracts, and no other, and each path leads to one of them."""
    nothing = Names("", "a", "b", "accounts/a/transactions/c", "", "apiKeys/k", "", "")
    table = base_requests(nothing)
    assert table.keys() == methods().keys()
    unreachable = [
        (name, rule)
        for name, method in methods().items()
        for rule in bindings(method)
        if transcode(rule, table[name][0]) is None
    ]
    assert not unreachable


def credentials(caller: Caller) -> Iterator[str]:
    """Credentials that are half the stranger's, or nobody's."""
    secret, their_id = caller.key.partition(".")[2], caller.theirs.api_key.removeprefix("apiKeys/")
    for key in (f"{their_id}.{secret}", f"{their_id}.x", f"nobody.{secret}"):
        yield f"Bearer {key}"
        yield f"Basic {b64encode(key.replace('.', ':').encode()).decode()}"


def questions(caller: Caller) -> Iterator[tuple[str, MethodDescriptor, Requests, dict[str, str]]]:
    """Everything that a caller asks: the field that is not their own, the method, the messages and the headers."""
    table = base_requests(caller.own)
    for name, method in methods().items():
        # One interceptor looks at them for all methods; each facade has words of its own.
        if name.partition("/")[0] in FACADES or method.name == "GetAccount":
            for credential in credentials(caller):
                yield credential, method, table[name], {"authorization": credential}
        for path, requests in probes(method, table[name], caller.theirs):
            for headers in headers_of(name, caller):
                yield path, method, requests, headers


async def answers(
    world: World, method: MethodDescriptor, requests: Requests, headers: dict[str, str]
) -> list[tuple[object, Answer]]:
    """What a world answers over gRPC, and over each REST path, each with what was sent."""
    name = f"{method.containing_service.full_name}/{method.name}"
    found: list[tuple[object, Answer]] = [(requests, await ask(world, name, requests, tuple(headers.items())))]
    for rule in bindings(method):
        rest = transcode(rule, requests[0])
        if rest is not None:
            found.append((rest, await asyncio.to_thread(send_rest, world, rest, headers)))
    return found


@pytest.mark.asyncio(loop_scope="module")
async def test_what_is_somebody_elses_is_not_there(worlds: tuple[World, World]) -> None:
    """Every answer is the same to the byte whether or not the stranger has what was asked for."""
    full, bare = worlds
    before = await strangers_books(full.book)
    problems: list[str] = []
    reached: set[str] = set()
    for caller in full.callers:
        for what, method, requests, headers in questions(caller):
            pairs = await asyncio.gather(*(answers(world, method, requests, headers) for world in (full, bare)))
            for (sent, one), (_, other) in zip(*pairs, strict=True):
                if one != other or any(secret in repr(one) for secret in SECRETS):
                    problems.append(f"{caller.title}, {method.name}, {what}: {sent}\n  full: {one}\n  bare: {other}")
                if one[0] in (200, grpc.StatusCode.OK):
                    reached.add(method.full_name)
                    assert what not in TOKEN_FIELDS, f"{method.name} took a page token of the stranger's"
    assert not problems, f"{len(problems)}:\n" + "\n".join(problems[:10])
    # A table of requests that are all refused would prove nothing.
    assert reached == {method.full_name for method in methods().values()}
    assert await strangers_books(full.book) == before


@pytest.mark.asyncio(loop_scope="module")
async def test_the_stranger_sees_what_nobody_else_does(worlds: tuple[World, World]) -> None:
    """What is asked for is there: each path that reads answers its owner with what no other answer may have."""
    full, _ = worlds
    for caller, stranger in zip(full.callers, full.strangers, strict=True):
        table = base_requests(caller.theirs)
        for name, method in methods().items():
            for rule in bindings(method):
                if rule.WhichOneof("pattern") != "get" or method.name == "VerifyAccounts":
                    continue
                key = caller.theirs.key_string if method.name == "GetCreditsHistory" else stranger.key
                request = transcode(rule, table[name][0])
                assert request is not None
                headers = {"authorization": f"Bearer {key}", NETWORK_HEADER: caller.theirs.network}
                answer = await asyncio.to_thread(send_rest, full, request, headers)
                assert any(secret in repr(answer) for secret in SECRETS), (request, answer)
