"""Fixtures of all tests: an empty ledger on each engine with a manual clock, a server for it, and the demo."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random

import grpc
import pytest
from hypothesis import settings

from server.app import serving
from server.book import Book, open_book
from server.config import Settings
from server.ledger.names import RandomBytes
from tests.support.browsers import CHROMIUM, LEFT_OUT
from tests.support.callers import Client, Server
from tests.support.certificates import Authority
from tests.support.clock import Clock
from tests.support.databases import PostgreSQL, ReusedDatabase, create_distributed_tables, create_tables, run_apart
from tests.support.http_client import send
from tests.support.processes import Daybook, Ports, copy_database, sqlite_url
from tests.support.sharding_monitor import Statements, monitor
from tests.support.toolchains import MISSING
from tests.support.waiting import wait_until

# Without a deadline, because a busy machine must not fail a test.
settings.register_profile("daybook", deadline=None)
settings.load_profile("daybook")

# Tests use a memory file system if it has room, because no test depends on the speed of a disk.
MEMORY, MEMORY_BYTES_MIN = Path("/dev/shm"), 4 << 30  # noqa: S108  # pytest creates its own folder in it
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free >= MEMORY_BYTES_MIN:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

# A shell without job control ignores SIGINT in its background jobs, and commands that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

FREE_PORT = Settings(port=0, shutdown_grace_seconds=1)
_statements = Statements()
monitor(_statements)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Fails a test in which the server sent PostgreSQL a statement that breaks the rules of sharding."""
    yield
    broken = _statements.take_broken()
    assert not broken, "\n".join(broken)


def pytest_report_header() -> str:
    """Names the missing toolchains, whose generated clients are not tested."""
    return f"generated clients not tested: {', '.join(sorted(MISSING)) or 'none'}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says which tests were left out because this machine has no browser."""
    if CHROMIUM is None:
        terminalreporter.section("no browser")
        terminalreporter.write_line(LEFT_OUT)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option that runs the contract suite on a cluster."""
    parser.addoption(
        "--cluster-url", help="URL of a database with Citus; runs only the contract tests, on this database"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Runs tests marked `long` first. On a cluster, deselects all tests but the contract tests."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if config.getoption("--cluster-url") is not None:
        config.hook.pytest_deselected(items=[item for item in items if not _is_of_contract(item)])
        items[:] = [item for item in items if _is_of_contract(item)]


def _is_of_contract(item: pytest.Item) -> bool:
    """Whether a test runs on PostgreSQL and needs only a database with empty tables."""
    assert isinstance(item, pytest.Function)
    engine = item.callspec.params.get("database_url") if hasattr(item, "callspec") else None
    is_apart = "postgresql" in item.fixturenames or item.get_closest_marker("one_server") is not None
    return engine == "postgresql" and "book" in item.fixturenames and not is_apart


@pytest.fixture
def clock() -> Clock:
    """The clock of the ledger under test."""
    return Clock()


@pytest.fixture
def random_bytes() -> RandomBytes:
    """A source of random bytes that are the same in every run."""
    return Random(20241010).randbytes


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of each engine, with empty tables if the test uses `book`."""
    has_tables = "book" in request.fixturenames
    if request.param == "sqlite":
        if has_tables:
            shutil.copyfile(request.getfixturevalue("migrated_file"), tmp_path / "daybook.db")
        yield f"sqlite+aiosqlite:///{tmp_path}/daybook.db"
        return
    if has_tables:
        reused_database: ReusedDatabase = request.getfixturevalue("reused_database")
        reused_database.empty()
        yield reused_database.url
        return
    postgresql: PostgreSQL = request.getfixturevalue("postgresql")
    name = f"test_{uuid.uuid4().hex}"
    postgresql.execute(f"CREATE DATABASE {name}")
    yield postgresql.url(name)
    postgresql.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """A PostgreSQL server for all tests of a process.

    Its data is outside pytest's folder, whose permissions another run of pytest would change.
    """
    with tempfile.TemporaryDirectory(prefix="daybook-postgresql-", ignore_cleanup_errors=True) as folder:
        server = PostgreSQL(Path(folder) / "data")
        yield server
        server.stop()


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite database with empty tables; copying it is faster than migrating a new one."""
    file = tmp_path_factory.mktemp("migrated") / "daybook.db"
    run_apart(create_tables(f"sqlite+aiosqlite:///{file}"))
    return file


@pytest.fixture(scope="session")
def reused_database(request: pytest.FixtureRequest) -> ReusedDatabase:
    """The PostgreSQL database that all tests with a `book` of a process use, one after the other."""
    cluster_url: str | None = request.config.getoption("--cluster-url")
    if cluster_url is not None:
        return ReusedDatabase(cluster_url, lambda: run_apart(create_distributed_tables(cluster_url)))
    postgresql: PostgreSQL = request.getfixturevalue("postgresql")
    url = postgresql.url("reused")

    def create() -> None:
        postgresql.execute("DROP DATABASE IF EXISTS reused WITH (FORCE)")
        postgresql.execute("CREATE DATABASE reused")
        run_apart(create_tables(url))

    return ReusedDatabase(url, create)


@pytest.fixture(scope="session")
def first_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of a run share, with the database and output of the first `daybook up --demo`."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "first-start"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def gateway(first_start: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daybook]:
    """The demo behind its gateway. At the end SIGINT must stop it with exit code 0 and without leftover processes.

    The first process of a run loads the demo data, which is slow; the others copy the database.
    """
    folder, ports, loaded = tmp_path_factory.mktemp("demo"), Ports.free(), first_start / "daybook.db"
    with ExitStack() as stack:
        lock = stack.enter_context((first_start / "lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        if loaded.exists():
            shutil.copyfile(loaded, folder / "daybook.db")
            lock.close()
        daybook = Daybook.start(
            *("up", "--demo", "--database-url", sqlite_url(folder / "daybook.db")),
            *ports.flags,
            folder=folder,
            ports=ports,
        )
        stack.callback(daybook.kill)
        daybook.wait_for("Ctrl-C stops it.")
        wait_until(lambda: send(daybook.origin, "/readyz").status == 200, "/readyz answers 200")
        if not loaded.exists():
            (first_start / "stdout").write_text(daybook.stdout)
            (first_start / "stderr").write_text(daybook.stderr)
            copy_database(folder / "daybook.db", loaded)
            lock.close()
        yield daybook
        assert daybook.stop() == 0


@pytest.fixture
async def book(database_url: str, clock: Clock, random_bytes: RandomBytes) -> AsyncIterator[Book]:
    """An empty ledger on each engine."""
    async with open_book(database_url, clock, random_bytes) as book:
        yield book


@pytest.fixture
async def server(book: Book) -> AsyncIterator[Server]:
    """A gRPC server for the ledger, on a free port."""
    async with serving(book, FREE_PORT) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Server(book, channel)


@pytest.fixture
async def client(server: Server) -> Client:
    """A caller with the default scopes, in the tenant `house`."""
    return await server.client(await server.create_tenant("house"))


@pytest.fixture
async def admin(server: Server, client: Client) -> Client:
    """A caller of the same tenant as `client`, with the scope `admin`."""
    del client  # This fixture creates the tenant.
    tenant_number = await server.book.credentials.tenant_number("house")
    assert tenant_number is not None
    return await server.client(tenant_number, scopes={"admin"})


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The certificate authority of the tests."""
    return Authority(tmp_path_factory.mktemp("authority"))
