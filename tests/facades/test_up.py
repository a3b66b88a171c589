"""The `daybook` command: its output, its refusals and its shutdown."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sqlite3
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import grpc
import psutil
import pytest
from daybook.v1.account_pb2 import Account
from daybook.v1.ledger_service_pb2 import (
    CreateAccountRequest,
    CreateTransactionRequest,
    GetAccountRequest,
    ListAccountsRequest,
)
from daybook.v1.transaction_pb2 import Transaction

from server.demo import guide
from tests.support import curl
from tests.support.callers import credential, ledger_stub
from tests.support.command_line import invoke, printed
from tests.support.golden import Matcher, read_exchanges
from tests.support.http_client import read_json, send
from tests.support.processes import (
    Daybook,
    Ports,
    copy_database,
    environment,
    printed_commands,
    require_gone,
    require_refusal,
    run,
    sqlite_url,
)
from tests.support.waiting import wait_until

TITLES = guide.commands(guide.Gateway(1)).keys()
SIGNALS = [signal.SIGINT, signal.SIGTERM]
Start = Callable[..., Daybook]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `daybook` commands in new folders, and kills the remaining ones at the end of the test."""
    started: list[Daybook] = []

    def start(*arguments: str, ports: Ports | None = None, **settings: str) -> Daybook:
        folder = tmp_path / f"run {len(started)}"
        started.append(Daybook.start(*arguments, folder=folder, ports=ports or Ports.free(), settings=settings))
        return started[-1]

    yield start
    for each in started:
        each.kill()


@pytest.fixture
def demo_database(gateway: Daybook, tmp_path: Path) -> Path:
    """A copy of the demo's database."""
    file = tmp_path / "demo.db"
    copy_database(gateway.folder / "daybook.db", file)
    return file


@pytest.fixture
def empty_database(tmp_path: Path) -> Path:
    """The path of a database that does not exist yet."""
    return tmp_path / "empty.db"


def start_up(start: Start, database: Path, *more: str) -> Daybook:
    """Starts `daybook up` on free ports; returns when it is ready."""
    ports = Ports.free()
    daybook = start("up", "--database-url", sqlite_url(database), *ports.flags, *more, ports=ports)
    wait_until(lambda: is_healthy(daybook), "/readyz answers 200")
    return daybook


def is_healthy(daybook: Daybook) -> bool:
    """Whether /readyz answers 200."""
    assert daybook.process.poll() is None, daybook.stderr
    try:
        return send(daybook.origin, "/readyz").status == 200
    except OSError:
        return False


def listens(port: int) -> bool:
    """Whether a port accepts connections."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_guide_has_a_command_for_each_api(gateway: Daybook) -> None:
    """`daybook up --demo` prints exactly one command per API."""
    assert printed_commands(gateway).keys() == TITLES


@pytest.mark.parametrize("title", sorted(TITLES))
def test_printed_command_succeeds(gateway: Daybook, title: str, tmp_path: Path) -> None:
    """Each printed command succeeds in a shell and prints rows."""
    # Last on the path: used only if curl is not installed.
    curl.install(tmp_path)
    result = subprocess.run(
        ["sh", "-c", printed_commands(gateway)[title]],
        cwd=gateway.folder,
        env=environment(PATH=f"{os.environ['PATH']}{os.pathsep}{tmp_path}"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    body = read_json(result.stdout)
    rows = body if isinstance(body, list) else [body]
    assert rows
    # A row has one of these fields; neither an error nor an empty list has.
    assert '"id"' in result.stdout or '"uid"' in result.stdout or '"user_id"' in result.stdout


def test_printed_commands_have_the_gateways_port(gateway: Daybook) -> None:
    """Each printed command has the gateway's host and port."""
    for command in printed_commands(gateway).values():
        (url,) = [word for word in shlex.split(command) if word.startswith("http")]
        assert url.startswith(f"{gateway.origin}/")


@pytest.mark.parametrize("which", ["server", "gateway", "admin"])
def test_taken_port_is_named(tmp_path: Path, empty_database: Path, which: str) -> None:
    """`daybook up` with a taken port prints one line with the port, before it creates the database."""
    ports = Ports.free()
    port = int(getattr(ports, which))
    with socket.create_server(("127.0.0.1", port)):
        result = run("up", "--demo", "--database-url", sqlite_url(empty_database), *ports.flags, folder=tmp_path)
    require_refusal(result, str(port), "taken")
    assert not empty_database.exists()


def test_taken_port_of_serve_is_named(tmp_path: Path, empty_database: Path) -> None:
    """`daybook serve` with a taken port prints one line with the port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run("serve", "--database-url", sqlite_url(empty_database), "--port", port, folder=tmp_path)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert [line for line in result.stderr.splitlines() if line.startswith("daybook: ") and port in line]


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_waits_for_calls_in_flight(start: Start, demo_database: Path, number: signal.Signals) -> None:
    """A call that began before the signal is answered; then all processes end with exit code 0."""
    daybook = start_up(start, demo_database)
    with (
        grpc.insecure_channel(f"127.0.0.1:{daybook.ports.gateway}") as channel,
        closing(sqlite3.connect(demo_database, isolation_level=None)) as other,
    ):
        # SQLite has one writer: no posting can commit during this transaction.
        other.execute("BEGIN IMMEDIATE")
        grant = Transaction(kind=Transaction.GRANT, category="test", amount="1")
        ledger, metadata = ledger_stub(channel), credential("demo-dreadnode.public")
        call = ledger.CreateTransaction.future(
            CreateTransactionRequest(parent="accounts/example", transaction=grant), metadata=metadata
        )
        wait_until(lambda: calls_in_flight(daybook) == 1, "the gateway passes the call on")
        # This call uses the same connections, so the server has received the posting when it is answered.
        ledger.GetAccount(GetAccountRequest(name="accounts/example"), metadata=metadata)
        family = daybook.family()
        daybook.process.send_signal(number)
        wait_until(lambda: not listens(daybook.ports.server), "the server takes no more connections")
        assert not call.done()
        assert daybook.process.poll() is None
        other.execute("ROLLBACK")
        posted: Transaction = call.result(timeout=60)
        assert posted.amount == "1"
        assert daybook.process.wait(60) == 0
        require_gone(family)
        assert other.execute(
            "SELECT count(*) FROM transactions WHERE uid = ?", (uuid.UUID(posted.uid).bytes,)
        ).fetchone() == (1,)
    assert "Traceback" not in daybook.stderr


def calls_in_flight(daybook: Daybook) -> int:
    """The number of calls that the gateway has passed on and that have no answer yet, without health checks."""
    admin = f"http://127.0.0.1:{daybook.ports.admin}"
    stats = send(admin, "/stats?filter=cluster.daybook.upstream_rq_active$").body.decode()
    return int(stats.rpartition(":")[2])


def test_envoy_ends_if_its_parent_is_killed(start: Start, demo_database: Path) -> None:
    """Envoy ends by itself if its parent is killed."""
    daybook = start_up(start, demo_database)
    family = daybook.family()
    assert [each.name() for each in family] == ["envoy"]
    daybook.process.kill()
    daybook.process.wait(60)
    require_gone(family)
    assert not listens(daybook.ports.gateway)


def test_up_ends_if_envoy_ends(start: Start, demo_database: Path) -> None:
    """`daybook up` ends with exit code 1 and a message if Envoy ends."""
    daybook = start_up(start, demo_database, "--demo")
    daybook.wait_for("Ctrl-C stops it.")
    (envoy,) = daybook.family()
    envoy.kill()
    assert daybook.process.wait(60) == 1
    assert "daybook: the gateway ended" in daybook.stderr
    assert "Traceback" not in daybook.stderr
    assert not listens(daybook.ports.server)


@pytest.mark.parametrize(("option", "address"), [("--host", "::"), ("--gateway-host", "0.0.0.0")])  # noqa: S104  # refused
def test_demo_stays_on_loopback(tmp_path: Path, demo_database: Path, option: str, address: str) -> None:
    """The demo is refused on other addresses than loopback, since its keys are public."""
    ports = Ports.free()
    children = set(psutil.Process().children(recursive=True))
    result = run(
        "up", "--demo", "--database-url", sqlite_url(demo_database), *ports.flags, option, address, folder=tmp_path
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert [line for line in result.stderr.splitlines() if line.startswith("daybook: ") and "loopback" in line]
    assert "Try, in another terminal" not in result.stdout
    assert set(psutil.Process().children(recursive=True)) == children
    assert not listens(ports.server)
    assert not listens(ports.gateway)


def test_serve_keeps_demo_data_on_loopback(tmp_path: Path, demo_database: Path) -> None:
    """`daybook serve` refuses to serve demo data on other addresses than loopback."""
    port = str(Ports.free().server)
    result = run(
        *("serve", "--database-url", sqlite_url(demo_database), "--port", port, "--host", "0.0.0.0"),  # noqa: S104  # refused
        folder=tmp_path,
    )
    require_refusal(result, "loopback")


def test_existing_demo_is_not_loaded_again(start: Start, demo_database: Path) -> None:
    """A second start serves the existing demo data without loading it again."""
    daybook = start_up(start, demo_database, "--demo")
    daybook.wait_for("Ctrl-C stops it.")
    assert "demo data loaded" not in daybook.stdout + daybook.stderr
    for name in ("nebulablock/01-documented", "dreadnode/01-list", "spacebring/01-pages"):
        for exchange in read_exchanges(Path(__file__).parent / f"{name}.http"):
            if "<" not in exchange.target:
                assert not exchange.replay(daybook.origin, Matcher())
    assert daybook.stop(signal.SIGINT) == 0


def test_first_start_loads_the_demo(gateway: Daybook, first_start: Path) -> None:
    """The first start loads the demo and logs it for each of the five tenants."""
    del gateway  # This fixture, or that of another pytest-xdist worker, fills the folder.
    assert "".join((first_start / name).read_text() for name in ("stdout", "stderr")).count("demo data loaded") == 5


def test_logs_go_to_stderr(gateway: Daybook, first_start: Path) -> None:
    """Standard output has no log lines."""
    assert "demo data loaded" in (first_start / "stderr").read_text()
    assert "demo data loaded" not in (first_start / "stdout").read_text()
    assert gateway.stdout.strip().startswith("Daybook is up")


def test_demo_is_refused_in_a_used_database(tmp_path: Path, empty_database: Path) -> None:
    """`--demo` is refused for a database that has other tenants."""
    url = sqlite_url(empty_database)
    printed(url, "tenants", "create", "house")
    result = run("up", "--demo", "--database-url", url, *Ports.free().flags, folder=tmp_path)
    require_refusal(result, "demo", "empty")
    with closing(sqlite3.connect(empty_database)) as connection:
        assert connection.execute("SELECT slug FROM tenants").fetchall() == [("house",)]


def test_running_server_accepts_new_keys(start: Start, empty_database: Path) -> None:
    """A running server accepts new keys, bound and unbound, and stops on SIGTERM."""
    url, ports = sqlite_url(empty_database), Ports.free()
    daybook = start("serve", "--database-url", url, "--port", str(ports.server), ports=ports)
    daybook.wait_for("serving")

    named = ("house", "--display-name", "The house")
    tenant = run("tenants", "create", *named, "--database-url", url, folder=daybook.folder)
    assert (tenant.returncode, tenant.stderr) == (0, "")
    assert uuid.UUID(tenant.stdout.strip())
    with grpc.insecure_channel(f"127.0.0.1:{ports.server}") as channel:
        ledger = ledger_stub(channel)
        unbound = printed(url, "keys", "create", "--tenant", "house")
        for account_id in ("mine", "theirs"):
            ledger.CreateAccount(
                CreateAccountRequest(account_id=account_id, account=Account(kind=Account.USER)),
                metadata=credential(unbound),
            )
        bound = printed(url, "keys", "create", "--tenant", "house", "--account", "mine")
        assert len({unbound, bound}) == 2
        mine = ledger.GetAccount(GetAccountRequest(name="accounts/mine"), metadata=credential(bound))
        assert mine.name == "accounts/mine"
        with pytest.raises(grpc.RpcError, match="PERMISSION_DENIED"):
            ledger.GetAccount(GetAccountRequest(name="accounts/theirs"), metadata=credential(bound))
        listed = ledger.ListAccounts(ListAccountsRequest(), metadata=credential(unbound))
        assert [account.name for account in listed.accounts] == ["accounts/mine", "accounts/theirs"]
        with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
            ledger.ListAccounts(ListAccountsRequest(), metadata=credential(f"{unbound}x"))
    assert daybook.stop(signal.SIGTERM) == 0
    assert "Traceback" not in daybook.stderr
    # The database holds only a hash of the secret.
    assert unbound.partition(".")[2].encode() not in empty_database.read_bytes()


def test_taken_and_missing_names_are_named(empty_database: Path) -> None:
    """A slug that is taken, a missing tenant and a missing account are named in one line."""
    url = sqlite_url(empty_database)
    printed(url, "tenants", "create", "house")
    for arguments, word in (
        (("tenants", "create", "house"), "house"),
        (("keys", "create", "--tenant", "unknown"), "unknown"),
        (("keys", "create", "--tenant", "house", "--account", "nothing"), "nothing"),
    ):
        require_refusal(invoke(*arguments, "--database-url", url), word)


@pytest.mark.parametrize(
    ("flags", "settings", "word"),
    [
        (("--port", "70000"), {}, "port"),
        (("--port", "-1"), {}, "port"),
        (("--log-level", "x"), {}, "log_level"),
        (("--gateway-port", "0"), {}, "gateway_port"),
        (("--shutdown-grace-seconds", "-1"), {}, "shutdown_grace_seconds"),
        ((), {"DAYBOOK_PORT": "abc"}, "port"),
        ((), {"DAYBOOK_LOG_FORMAT": "xml"}, "log_format"),
        ((), {"DAYBOOK_RATE_LIMIT_BURST": "0"}, "rate_limit_burst"),
        (("--workers", "3", "--port", "50053"), {}, "worker_port_base"),
        ((), {"DAYBOOK_RATE_LIMIT_CALLS_PER_SECOND": "0.0001"}, "rate_limit_calls_per_second"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_bad_setting_is_named(tmp_path: Path, flags: tuple[str, ...], settings: dict[str, str], word: str) -> None:
    """An invalid setting ends the command with code 2 and one line that names it."""
    result = invoke("up", "--database-url", sqlite_url(tmp_path / "never.db"), *flags, settings=settings)
    require_refusal(result, word, code=2)
    assert not (tmp_path / "never.db").exists()


def test_flag_takes_precedence_over_environment(start: Start, empty_database: Path) -> None:
    """A flag takes precedence over DAYBOOK_PORT, which takes precedence over the default."""
    of_environment, of_flag = Ports.free(), Ports.free()
    settings = {"DAYBOOK_PORT": str(of_environment.server), "DAYBOOK_DATABASE_URL": sqlite_url(empty_database)}
    by_environment = start("serve", ports=of_environment, **settings)
    by_environment.wait_for("serving")
    assert listens(of_environment.server)
    assert empty_database.exists()
    by_flag = start("serve", "--port", str(of_flag.server), ports=of_flag, **settings)
    by_flag.wait_for("serving")
    assert listens(of_flag.server)
    assert by_flag.stop(signal.SIGINT) == 0
    assert by_environment.stop(signal.SIGTERM) == 0
