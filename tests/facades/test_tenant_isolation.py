"""Tenant isolation: a foreign resource is answered like a missing one, by every method and every REST path.

A resource is foreign if it belongs to another tenant, or to another account than the caller's key.
There are two worlds. The full one has foreign resources of every kind; the bare one has none, and
is otherwise identical: clock, randomness, the caller's own resources. A caller requests the foreign
resources from both, in every field that can name one. Each answer must be the same in both worlds,
byte for byte with status, headers and trailers, so that it discloses neither a foreign row nor its
existence. The foreign rows must not change. The duration of a call is not compared.

Two disclosures are documented in the contracts, and equal in both worlds:

- An account's `number` counts the accounts of all tenants (account.proto). Both worlds have equally many.
- A page token that was sealed for another tenant gets PAGE_TOKEN_MISMATCH, an invalid one
  PAGE_TOKEN_INVALID (ListTransactionsRequest.page_token). A caller cannot guess a sealed token.
  Both worlds seal with the same key.
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
    ExportTransactionsRequest,
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
"""The messages of one call: one, or several for a client stream."""
Answer: TypeAlias = tuple[object, ...]

FOREIGN_PREFIX = "zq7"
"""The prefix of all foreign ids."""
PRIVATE = "q9private"
"""The value of all other foreign texts. No caller sends it."""
GRANTED = "31415.926535"
"""The grant of foreign accounts only. Their balance keeps its fraction."""
SECRETS = (PRIVATE, ".926535", '"balance":31415,')
"""Foreign content that no caller's answer may have. The last is Dreadnode's balance, in whole credits."""
TOKEN_FIELDS = ("page_token", "cursor", "next_page_token")
EVERYTHING = {"admin"}
TENANTS = ("own", "shared", "foreign")
"""The slugs of the tenants; two callers share the second."""


@dataclass
class Resources:
    """The names of a tenant's resources."""

    network: str
    account: str
    other: str
    """Another account of the tenant."""
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
    """A caller with a key, the caller's own resources, and foreign ones."""

    title: str
    key: str
    own: Resources
    foreign: Resources


@dataclass(frozen=True)
class World:
    """A ledger, its server, and a gateway in front of it."""

    book: Book
    channel: grpc.aio.Channel
    origin: str
    callers: Sequence[Caller]
    owners: Sequence[Client]
    """Clients that may read the foreign resources of the callers, in the same order."""


def transaction(text: str, kind: Transaction.Kind.ValueType, category: str, amount: str, **fields: Any) -> Transaction:
    """A transaction whose free texts all have one value."""
    return Transaction(
        kind=kind,
        category=category,
        amount=amount,
        **{
            "description": text,
            "owner": User(id=text, name=text),
            "creator": User(id=text, name=text, email=text, membership=text),
            "metadata": Struct(fields={text: Value(string_value=text)}),
            "receipt_uri": text,
            **fields,
        },
    )


async def create_resources(client: Client, prefix: str, network: str, text: str, granted: str) -> Resources:
    """Creates two accounts of a tenant with resources of every kind; returns their names."""
    account, other, request_id = f"{prefix}-space", f"{prefix}-other", f"{prefix}-request"
    parent = f"accounts/{account}"
    company = Company(title=text, legal_name=text, tax_id=text, notes=text)
    await client.create_account(account, kind=Account.COMPANY, display_name=text, company=company)
    await client.create_account(other, kind=Account.USER, display_name=text, user=User(id=text, name=text))
    labels = {"location": f"{prefix}-location", "membership": f"{prefix}-membership", "company": account}

    async def post(kind: Transaction.Kind.ValueType, category: str, amount: str, **fields: Any) -> Transaction:
        message = transaction(text, kind, category, amount, labels=labels, **fields)
        return await client.ledger.CreateTransaction(
            CreateTransactionRequest(parent=parent, transaction=message), metadata=client.metadata
        )

    await post(Transaction.GRANT, "purchase", granted)
    await post(Transaction.GRANT, "credit_package", "7", ttl=Duration(seconds=86_400))
    charge = await post(Transaction.CHARGE, "inference", "-2", usage=Usage(model=text, input_tokens=5))
    await post(Transaction.CHARGE, "computing", "-1", usage=Usage(model=text))
    await post(Transaction.CHARGE, "ai_chat", "-1")
    await post(Transaction.CHARGE, "booking", "-1", booking=Booking(id=text))
    await post(Transaction.CHARGE, "order", "-1", order=Order(id=text))
    await post(Transaction.CHARGE, "event_ticket", "-1", event_ticket=EventTicket(id=text))
    await client.ledger.RefundTransaction(
        RefundTransactionRequest(name=charge.name, amount="1", request_id=request_id), metadata=client.metadata
    )
    await client.ledger.TransferCredits(
        TransferCreditsRequest(name=parent, destination=f"accounts/{other}", amount="1", description=text),
        metadata=client.metadata,
    )
    lots = await client.ledger.ListLots(ListLotsRequest(parent=parent, page_size=1), metadata=client.metadata)
    created_key = await client.admin.CreateApiKey(
        CreateApiKeyRequest(api_key=ApiKey(display_name=text, scopes=["admin"], account=parent)),
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
    return Resources(
        network=network,
        account=account,
        other=other,
        charge=charge.name,
        lot=lots.lots[0].name,
        api_key=created_key.api_key.name,
        key_string=created_key.key_string,
        request_id=request_id,
        tokens=tokens,
    )


async def populate(server: Server, *, is_full: bool) -> tuple[list[Caller], list[Client]]:
    """Creates the callers' own resources, equal in both worlds, then the foreign ones; returns callers and owners."""
    own_tenant, shared_tenant, foreign_tenant = [await server.create_tenant(slug) for slug in TENANTS]
    networks = {slug: str(uuid5(NAMESPACE_URL, slug)) for slug in TENANTS}
    own_admin = await server.client(own_tenant, scopes=EVERYTHING)
    shared_admin = await server.client(shared_tenant, scopes=EVERYTHING)
    own = await create_resources(own_admin, "own", networks["own"], "own", "1000")
    own_account = await create_resources(shared_admin, "own", networks["shared"], "own", "1000")
    bound_client = await server.client(shared_tenant, account_id=own_account.account, scopes=EVERYTHING)
    foreign_admin = await server.client(foreign_tenant, scopes=EVERYTHING)
    owners = [foreign_admin, shared_admin]
    if is_full:
        of_tenant = await create_resources(foreign_admin, FOREIGN_PREFIX, networks["foreign"], PRIVATE, GRANTED)
        of_account = await create_resources(shared_admin, FOREIGN_PREFIX, networks["shared"], PRIVATE, GRANTED)
    else:
        for client in owners:
            for name in ("first", "second"):
                await client.create_account(name)
        # Unused: the requests to both worlds name the resources of the full one.
        of_tenant = of_account = own
    return [
        Caller("another tenant", own_admin.key, own, of_tenant),
        Caller("another account", bound_client.key, own_account, of_account),
    ], owners


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worlds(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[World, World]]:
    """The full world and the bare one."""
    worlds = []
    async with AsyncExitStack() as stack:
        for is_full in (True, False):
            folder = tmp_path_factory.mktemp("world")
            database_url = f"sqlite+aiosqlite:///{folder}/daybook.db"
            async with (
                open_book(database_url, Clock(), Random(1).randbytes) as book,
                serving(book, Settings(port=0)) as port,
                grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
            ):
                callers, owners = await populate(Server(book, channel), is_full=is_full)
            # Both worlds restart with the same clock and randomness.
            book = await stack.enter_async_context(open_book(database_url, Clock(NOON + SECOND), Random(2).randbytes))
            port = await stack.enter_async_context(serving(book, Settings(port=0)))
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
            origin = await asyncio.to_thread(stack.enter_context, gateway_before(folder, port))
            owners = [Client(channel, each.key) for each in owners]
            worlds.append(World(book, channel, origin, callers, owners))
        yield worlds[0], worlds[1]


def methods() -> dict[str, MethodDescriptor]:
    """Every method of the contracts, by its full name."""
    services = [Default().FindServiceByName(service) for service in SERVICES]
    found = {f"{service.full_name}/{method.name}": method for service in services for method in service.methods}
    # In descending order, so that a key is rotated before it is revoked.
    return dict(sorted(found.items(), reverse=True))


def base_requests(own: Resources) -> dict[str, Requests]:
    """A permitted request for each method, for the caller's own resources."""
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
        f"{ledger}/ExportTransactions": [
            ExportTransactionsRequest(parent="accounts/-", format=ExportTransactionsRequest.NDJSON)
        ],
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


def foreign_values(name: str, foreign: Resources) -> Iterable[str]:
    """Values of a field that name foreign resources; account ids for a field without a rule."""
    account = f"accounts/{foreign.account}"
    match name:
        case "name" | "refund_of" | "transfer_peer" | "last_transaction":
            return account, f"{account}/balance", foreign.charge, foreign.lot, foreign.api_key
        case "parent" | "destination" | "account.name" | "api_key.account":
            return account, f"accounts/{foreign.other}"
        case _ if name in TOKEN_FIELDS:
            return foreign.tokens
        case "request_id":
            return (foreign.request_id,)
        case "filter":
            return [
                f'labels.{label} = "{value}"'
                for label, value in (
                    ("company", foreign.account),
                    ("location", f"{FOREIGN_PREFIX}-location"),
                    ("membership", f"{FOREIGN_PREFIX}-membership"),
                )
            ]
        case "account":
            return account, foreign.account
    return foreign.account, foreign.other


def texts(descriptor: Descriptor) -> Iterator[list[tuple[str, FieldDescriptor]]]:
    """The text fields of Daybook's messages with their paths, at any depth.

    Each is a group of its own, except those of a message in STORED_MESSAGES, which form one group.
    """
    for each in descriptor.fields:
        inside = each.message_type
        if each.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            yield [(each.name, each)]
        elif inside is not None and inside.full_name.startswith("daybook."):
            found = [[(f"{each.name}.{path}", text) for path, text in group] for group in texts(inside)]
            yield from [[text for group in found for text in group]] if inside.full_name in STORED_MESSAGES else found


def set_text(message: Any, path: str, value: str) -> None:
    """Sets the text at a path. A repeated field gets it in its last message, which is added if there is none."""
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
        set_text(inside, rest, value)
    elif descriptor.message_type.GetOptions().map_entry:
        inside["company"] = value
    else:
        set_text(inside[-1] if inside else inside.add(), rest, value)


TEXT_PATHS = ("account.name", "api_key.account")
"""Texts identified by their path, since fields of the same name have another meaning elsewhere."""
STORED_MESSAGES = CHARACTERS_MAX.keys() - {Account.DESCRIPTOR.full_name, ApiKey.DESCRIPTOR.full_name}
"""Messages that are stored unchanged, or refused if output-only. Their texts are never used for a lookup."""
FORMATTED = ("amount", "category", "country_code", "cost_usd", "key")
"""Texts of these messages with a required format: a foreign name there would make the whole request invalid."""


def probes(method: MethodDescriptor, base: Requests, foreign: Resources) -> Iterator[tuple[str, Requests]]:
    """The base request, and a copy for each text and each foreign name that the text can have."""
    yield "", base
    for group in texts(method.input_type):
        free = [(path, text) for path, text in group if len(group) == 1 or text.name not in FORMATTED]
        values = [foreign_values(path if path in TEXT_PATHS else text.name, foreign) for path, text in free]
        for some in [values] if len(group) > 1 else zip(*values, strict=True):
            changed = [type(each).FromString(each.SerializeToString()) for each in base]
            for (path, _), value in zip(free, some, strict=True):
                set_text(changed[-1], path, value if isinstance(value, str) else value[0])
            yield free[0][0], changed


async def call_grpc(world: World, method: str, requests: Requests, metadata: Sequence[tuple[str, str]]) -> Answer:
    """The answer over gRPC. Every method can be called as a bidirectional stream."""
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
    """The HTTP rules of a method, one per REST path."""
    rule: HttpRule = method.GetOptions().Extensions[http]
    return [each for each in (rule, *rule.additional_bindings) if each.WhichOneof("pattern")]


@dataclass(frozen=True)
class RestRequest:
    """A request over REST."""

    method: str
    target: str
    body: bytes


def transcode(rule: HttpRule, request: Message) -> RestRequest | None:
    """The REST form of a request, or None if the path cannot express it."""
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
    """The answer over REST, without its date header."""
    more = {"content-type": "application/json"} if request.body else {}
    answer = send(
        world.origin,
        request.target,
        method=request.method,
        # Without these two headers, the answers of two gateways would differ.
        headers={"host": "daybook.example", "x-request-id": "same", **headers, **more},
        body=request.body,
    )
    shown = tuple((name, value) for name, value in answer.headers if name != "date")
    return answer.status, shown, answer.body


def headers_of(method: str, caller: Caller) -> Iterator[dict[str, str]]:
    """The headers of a caller; for Spacebring, which names the tenant in one, also with the foreign tenant."""
    credential = {"authorization": f"Bearer {caller.key}"}
    if not method.startswith(spacebring.VENDOR.service):
        yield credential
        return
    for network in (caller.own.network, caller.foreign.network):
        yield {**credential, NETWORK_HEADER: network}


async def foreign_rows(book: Book) -> dict[str, list[str]]:
    """All rows of foreign resources, by table."""
    async with book.database.primary.snapshot() as connection:
        rows = {
            table.name: [row._asdict() for row in await connection.execute(select(table))]
            for table in schema.sorted_tables
        }
    (tenant,) = [row["number"] for row in rows["tenants"] if row["slug"] == "foreign"]
    # Callers may have created an account with the same id.
    (own,) = [row["number"] for row in rows["tenants"] if row["slug"] == "own"]
    numbers = {
        row["number"]
        for row in rows["accounts"]
        if row["id"].startswith(FOREIGN_PREFIX) and row["tenant_number"] != own
    }
    keys = {row["id"] for row in rows["api_keys"] if row["account_number"] in numbers or row["tenant_number"] == tenant}
    foreign = {"account_number": numbers, "tenant_number": {tenant}, "key_id": keys}
    numbered = {"accounts": numbers, "tenants": {tenant}}
    return {
        table: sorted(
            repr(row)
            for row in each
            if any(row.get(column) in values for column, values in foreign.items())
            or row.get("number") in numbered.get(table, ())
        )
        for table, each in rows.items()
    }


def test_every_method_has_a_request() -> None:
    """base_requests has exactly the methods of the contracts, and each REST path can express its request."""
    names = Resources("", "a", "b", "accounts/a/transactions/c", "", "apiKeys/k", "", "")
    table = base_requests(names)
    assert table.keys() == methods().keys()
    unreachable = [
        (name, rule)
        for name, method in methods().items()
        for rule in bindings(method)
        if transcode(rule, table[name][0]) is None
    ]
    assert not unreachable


def credentials(caller: Caller) -> Iterator[str]:
    """Invalid credentials: a foreign or an unknown key id, with the caller's secret or a wrong one."""
    secret, foreign_id = caller.key.partition(".")[2], caller.foreign.api_key.removeprefix("apiKeys/")
    for key in (f"{foreign_id}.{secret}", f"{foreign_id}.x", f"unknown.{secret}"):
        yield f"Bearer {key}"
        yield f"Basic {b64encode(key.replace('.', ':').encode()).decode()}"


def calls_of(caller: Caller) -> Iterator[tuple[str, MethodDescriptor, Requests, dict[str, str]]]:
    """All calls of a caller: the changed field or credential, the method, its messages and headers."""
    table = base_requests(caller.own)
    for name, method in methods().items():
        # One handler checks credentials for all native methods; each facade has its own error format.
        if name.partition("/")[0] in FACADES or method.name == "GetAccount":
            for credential in credentials(caller):
                yield credential, method, table[name], {"authorization": credential}
        for path, requests in probes(method, table[name], caller.foreign):
            for headers in headers_of(name, caller):
                yield path, method, requests, headers


async def answers(
    world: World, method: MethodDescriptor, requests: Requests, headers: dict[str, str]
) -> list[tuple[object, Answer]]:
    """The answers of a world over gRPC and over each REST path, each with its request."""
    name = f"{method.containing_service.full_name}/{method.name}"
    found: list[tuple[object, Answer]] = [(requests, await call_grpc(world, name, requests, tuple(headers.items())))]
    for rule in bindings(method):
        rest = transcode(rule, requests[0])
        if rest is not None:
            found.append((rest, await asyncio.to_thread(send_rest, world, rest, headers)))
    return found


@pytest.mark.asyncio(loop_scope="module")
async def test_foreign_resource_is_answered_like_a_missing_one(worlds: tuple[World, World]) -> None:
    """Every answer is byte for byte the same, whether or not the foreign resource exists."""
    full, bare = worlds
    rows = await foreign_rows(full.book)
    problems: list[str] = []
    reached: set[str] = set()
    for caller in full.callers:
        for field_name, method, requests, headers in calls_of(caller):
            pairs = await asyncio.gather(*(answers(world, method, requests, headers) for world in (full, bare)))
            for (sent, one), (_, other) in zip(*pairs, strict=True):
                if one != other or any(secret in repr(one) for secret in SECRETS):
                    problems.append(
                        f"{caller.title}, {method.name}, {field_name}: {sent}\n  full: {one}\n  bare: {other}"
                    )
                if one[0] in (200, grpc.StatusCode.OK):
                    reached.add(method.full_name)
                    assert field_name not in TOKEN_FIELDS, f"{method.name} accepted a foreign page token"
    assert not problems, f"{len(problems)}:\n" + "\n".join(problems[:10])
    # The comparison is meaningful only if each method also succeeds.
    assert reached == {method.full_name for method in methods().values()}
    assert await foreign_rows(full.book) == rows


@pytest.mark.asyncio(loop_scope="module")
async def test_owner_reads_the_foreign_resources(worlds: tuple[World, World]) -> None:
    """Each reading path answers the owner of a foreign resource with its content, so the resource exists."""
    full, _ = worlds
    for caller, owner in zip(full.callers, full.owners, strict=True):
        table = base_requests(caller.foreign)
        for name, method in methods().items():
            for rule in bindings(method):
                if rule.WhichOneof("pattern") != "get" or method.name == "VerifyAccounts":
                    continue
                key = caller.foreign.key_string if method.name == "GetCreditsHistory" else owner.key
                request = transcode(rule, table[name][0])
                assert request is not None
                headers = {"authorization": f"Bearer {key}", NETWORK_HEADER: caller.foreign.network}
                answer = await asyncio.to_thread(send_rest, full, request, headers)
                assert any(secret in repr(answer) for secret in SECRETS), (request, answer)
