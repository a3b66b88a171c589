"""Builds the ledgers that are measured: tenants and their first keys in the store, all other data through the API."""

from __future__ import annotations

import asyncio
import subprocess
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from random import Random
from typing import TypeAlias

import grpc
from daybook.v1.account_pb2 import Account, Company, User
from daybook.v1.admin_service_pb2 import (
    CreateApiKeyRequest,
    CreateApiKeyResponse,
    ImportTransactionsRequest,
    ImportTransactionsResponse,
)
from daybook.v1.api_key_pb2 import ApiKey
from daybook.v1.ledger_service_pb2 import CreateAccountRequest
from daybook.v1.transaction_pb2 import Booking, Transaction, Usage
from google.protobuf.timestamp_pb2 import Timestamp

from bench.calls import PAGE_SIZE, Call, answer_each, authorization
from bench.load import LoadFailed
from bench.servers import DAYBOOK, Server, daybook
from bench.traffic import SEED, zipf_weights
from server.book import Book, open_book
from server.ledger.access import ADMIN, new_api_key
from server.transport.addresses import NO_PROXY

MONTH = "2025-10"
"""The month of all imported transactions of the pools."""
ORGANIZATION = "example"
NETWORK = str(uuid.uuid5(uuid.NAMESPACE_URL, "daybook:bench:network"))
LOCATION = str(uuid.uuid5(uuid.NAMESPACE_URL, "daybook:bench:location"))
MEMBERSHIP = str(uuid.uuid5(uuid.NAMESPACE_URL, "daybook:bench:membership"))
WRITERS = tuple(f"writer-{number}" for number in range(8))
"""The accounts that figures 6 to 8 charge."""
POOL_ROWS = 2 * PAGE_SIZE + 4
"""The number of transactions of each account of a pool: enough for two full pages."""
ITEMS_PER_MESSAGE = 1000
IMPORT_SECONDS_MAX = 600.0
IMPORT = "daybook.v1.Admin/ImportTransactions"

_TENANT = "bench"
_NETWORK_TENANT = "bench-network"
_SEEDED = "bench"
_START = Timestamp()
_START.FromJsonString("2025-10-01T00:00:00Z")
_HOUR_SECONDS = 3600
_GRANTED = "1000000000"

Item: TypeAlias = ImportTransactionsRequest.Item
Event: TypeAlias = Callable[[str, int], Transaction]
"""Returns a transaction, by the id of its account and its number in the account."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """A filled database, and API keys for it."""

    database_url: str
    key: str
    """The tenant's key, with all scopes."""
    network_key: str = ""
    """The key of the network that Spacebring's facade lists, with all scopes. Empty in a seeded ledger."""
    user_keys: tuple[str, ...] = ()
    """The keys that are bound to the accounts of the pool USERS."""
    pool_size: int = 0
    """The number of accounts of each pool."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Accounts of one kind, the most popular first, each with POOL_ROWS transactions.

    The COMPANIES instead have transactions in proportion to their popularity.
    """

    kind: Account.Kind.ValueType
    account_id: Callable[[int], str]
    event: Event
    """Returns a transaction of an account of the pool."""

    def account_ids(self, size: int) -> list[str]:
        """Returns the ids of all accounts, the most popular first."""
        return [self.account_id(number) for number in range(size)]


def build(database_url: str, rows: int, pools: Iterable[Pool] = (), pool_size: int = 0) -> Ledger:
    """Fills an empty database: ORGANIZATION with `rows` transactions, WRITERS, and pools of accounts."""
    key, network_key = asyncio.run(_create_tenants(database_url))
    user_keys: tuple[str, ...] = ()
    with daybook(database_url) as server:
        create_accounts(server, key, Account.ORGANIZATION, [ORGANIZATION])
        create_accounts(server, key, Account.USER, WRITERS)
        seconds = 60 / max(1, rows // 40_000)
        grants = chain.from_iterable(_history(each, 1, 0, inference) for each in WRITERS)
        import_history(server, key, as_messages(_history(ORGANIZATION, rows, seconds, inference)))
        import_history(server, key, as_messages(grants))
        for pool in pools:
            account_ids = pool.account_ids(pool_size)
            pool_key = network_key if pool is COMPANIES else key
            create_accounts(server, pool_key, pool.kind, account_ids)
            if pool is COMPANIES:
                # Spacebring lists the whole tenant, so its pages must mix accounts like real traffic.
                items = mixed_history(account_ids, pool_size + rows, pool.event)
            else:
                # One transaction per hour, because a row of Nebula Block's list is an hour.
                items = chain.from_iterable(
                    _history(each, POOL_ROWS, _HOUR_SECONDS, pool.event) for each in account_ids
                )
            import_history(server, pool_key, as_messages(items))
            if pool is USERS:
                user_keys = _create_keys(server, key, account_ids)
    return Ledger(database_url, key, network_key, user_keys, pool_size)


def seed(database_url: str, rows: int) -> Ledger:
    """Fills an empty database with `rows` generated transactions, by `daybook seed`."""
    command = [DAYBOOK, "seed", "--database-url", database_url, "--rows", str(rows), "--tenant", _SEEDED]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise LoadFailed(f"daybook seed ended with {done.returncode}:\n{done.stderr}")
    return asyncio.run(_open_seeded(database_url))


async def _open_seeded(database_url: str) -> Ledger:
    async with open_book(database_url) as book:
        number = await book.credentials.tenant_number(_SEEDED)
        assert number is not None, "the seed creates it"
        return Ledger(database_url, key=await _create_tenant_key(book, number))


async def _create_tenants(database_url: str) -> tuple[str, str]:
    """Creates both tenants. Returns their keys."""
    async with open_book(database_url) as book:
        keys = []
        for slug, uid in ((_TENANT, str(uuid.uuid5(uuid.NAMESPACE_URL, "daybook:bench"))), (_NETWORK_TENANT, NETWORK)):
            number = await book.credentials.create_tenant(
                slug=slug, uid=uid, display_name=slug, create_time=book.clock()
            )
            keys.append(await _create_tenant_key(book, number))
        return keys[0], keys[1]


async def _create_tenant_key(book: Book, tenant_number: int) -> str:
    key = new_api_key(book.random_bytes)
    await book.credentials.create_api_key(
        key_id=key.key_id,
        secret_hash=key.secret_hash,
        tenant_number=tenant_number,
        account_number=None,
        create_time=book.clock(),
        scopes=(ADMIN,),
    )
    return key.text


def create_accounts(server: Server, key: str, kind: Account.Kind.ValueType, account_ids: Iterable[str]) -> None:
    """Creates accounts of one kind in the tenant of the key."""
    company = Company(title="Example Company", location=LOCATION) if kind == Account.COMPANY else None
    requests = (
        CreateAccountRequest(account_id=account_id, account=Account(kind=kind, company=company))
        for account_id in account_ids
    )
    answer_each(server.port, (Call.of("daybook.v1.Ledger/CreateAccount", each, key=key) for each in requests))


def _create_keys(server: Server, key: str, account_ids: Iterable[str]) -> tuple[str, ...]:
    requests = (
        CreateApiKeyRequest(api_key=ApiKey(scopes=["transactions"], account=f"accounts/{account_id}"))
        for account_id in account_ids
    )
    calls = (Call.of("daybook.v1.Admin/CreateApiKey", each, key=key) for each in requests)
    return tuple(CreateApiKeyResponse.FromString(answer).key_string for answer in answer_each(server.port, calls))


def as_messages(items: Iterable[Item]) -> Iterator[ImportTransactionsRequest]:
    """Groups items into messages of the largest size that the server accepts."""
    rest = iter(items)
    while batch := list(islice(rest, ITEMS_PER_MESSAGE)):
        yield ImportTransactionsRequest(items=batch)


def import_history(server: Server, key: str, messages: Iterable[ImportTransactionsRequest]) -> int:
    """Makes one ImportTransactions call. Returns the number of imported rows. Raises LoadFailed if it fails."""
    with grpc.insecure_channel(f"127.0.0.1:{server.port}", NO_PROXY) as channel:
        method = channel.stream_unary(
            f"/{IMPORT}",
            request_serializer=ImportTransactionsRequest.SerializeToString,
            response_deserializer=ImportTransactionsResponse.FromString,
        )
        try:
            answer = method(iter(messages), metadata=tuple(authorization(key).items()), timeout=IMPORT_SECONDS_MAX)
        except grpc.RpcError as error:
            raise LoadFailed(f"{IMPORT}: {error}") from None
    return int(answer.imported_count)


def _item(account_id: str, seconds: float, transaction: Transaction) -> Item:
    """Returns an import item at `seconds` after the start of MONTH."""
    whole = int(seconds)
    time = Timestamp(seconds=_START.seconds + whole, nanos=round((seconds - whole) * 1_000_000) * 1000)
    return Item(parent=f"accounts/{account_id}", transaction=transaction, create_time=time)


def _history(account_id: str, rows: int, seconds: float, event: Event) -> Iterator[Item]:
    """Yields a grant and `rows - 1` transactions, `seconds` apart."""
    for number in range(rows):
        yield _item(account_id, number * seconds, event(account_id, number) if number else _grant())


def mixed_history(account_ids: Sequence[str], rows: int, event: Event) -> Iterator[Item]:
    """Yields a grant for each account, then transactions of accounts picked by Zipf, one second apart."""
    random = Random(SEED)
    cumulative = list(accumulate(zipf_weights(len(account_ids))))
    for number in range(rows):
        if number < len(account_ids):
            yield _item(account_ids[number], number, _grant())
        else:
            (account_id,) = random.choices(account_ids, cum_weights=cumulative)
            yield _item(account_id, number, event(account_id, number))


def _grant() -> Transaction:
    return Transaction(kind=Transaction.GRANT, category="purchase", amount=_GRANTED, description="Top-up")


def inference(_account_id: str, number: int) -> Transaction:
    """Returns a charge that the native list and the lists of Dreadnode and Paged show."""
    return Transaction(
        kind=Transaction.CHARGE,
        category="inference",
        amount=f"-{1 + number % 9}",
        description="Evaluation run",
        usage=Usage(
            model=("example-large", "example-small")[number % 2],
            input_tokens=1800 + number % 997,
            output_tokens=420 + number % 101,
            cost_usd="0.0125",
        ),
    )


def _ai_chat(_account_id: str, number: int) -> Transaction:
    return Transaction(
        kind=Transaction.CHARGE,
        category="ai_chat",
        amount=f"-0.{1 + number % 9}",
        creator=User(id="usrExample", name="Example", photo_uri="https://example.com/avatars/example.png"),
        usage=Usage(model="example-large"),
    )


def _computing(_account_id: str, number: int) -> Transaction:
    return Transaction(
        kind=Transaction.CHARGE, category="computing", amount=f"-0.{1 + number % 9}", usage=Usage(model="RTX-A6000")
    )


def _booking(account_id: str, number: int) -> Transaction:
    member = User(id=str(uuid.uuid5(uuid.NAMESPACE_URL, "daybook:bench:member")), name="Member", membership=MEMBERSHIP)
    return Transaction(
        kind=Transaction.CHARGE,
        category="booking",
        amount=f"-{1 + number % 4}.5",
        creator=member,
        owner=member,
        labels={"location": LOCATION, "membership": MEMBERSHIP, "company": account_id},
        booking=Booking(id=f"booking-{number}", resource=Booking.Resource(id="room", title="Small meeting room")),
    )


def _company_id(number: int) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"daybook:bench:company:{number}"))


ORGANIZATIONS = Pool(Account.ORGANIZATION, lambda number: f"organization-{number}", inference)
SPACES = Pool(Account.SPACE, lambda number: f"spc{number}", _ai_chat)
# Nebula Block's user ids are numbers.
USERS = Pool(Account.USER, lambda number: str(1000 + number), _computing)
COMPANIES = Pool(Account.COMPANY, _company_id, _booking)
POOLS = (ORGANIZATIONS, SPACES, USERS, COMPANIES)
