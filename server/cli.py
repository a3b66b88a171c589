"""The `daybook` command."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import structlog
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress as RichProgress
from rich.progress import TextColumn

from server.app import Book, CannotStart, check_demo, database_limits, open_book, serving, system_clock
from server.config import Settings, is_loopback
from server.demo.guide import what_to_try
from server.demo.load import DATABASE_URL as DEMO_DATABASE_URL
from server.demo.load import load as load_demo
from server.gateway import gateway, reachable, require_certificates, require_free_ports, write_deployment
from server.ledger.access import ADMIN, DEFAULT_SCOPES, SUFFICIENT, Caller
from server.ledger.errors import DaybookError, Unavailable
from server.ledger.instants import HOUR, SECOND, Instant
from server.ledger.instants import parse as parse_instant
from server.ledger.instants import write as write_instant
from server.ledger.paging import ApiKeyKey
from server.logs import configure_logs
from server.seed.guide import commands as seed_commands
from server.seed.guide import what_to_try as what_to_try_with_seed
from server.seed.history import DAY
from server.seed.load import HOT_ACCOUNT, ROWS_MAX, ROWS_MIN, Wish
from server.seed.load import load as load_seed
from server.store.distribute import distribute as distribute_tables
from server.supervisor import end_with_supervisor, supervising
from server.transport.readiness import is_serving
from server.transport.token_keys import KEY_BYTES
from server.transport.validation import DISPLAY_NAME_CHARACTERS_MAX, GRACE_PERIOD_DAYS_MAX, TIME_TO_LIVE_DAYS_MAX
from server.usecases.api_keys import ApiKeyDraft
from server.usecases.verification import Progress

KEYS_AT_ONCE = 500
COLLECTOR_THRESHOLDS = (20_000, 50, 100)
"""After how many new objects the youngest are searched for cycles, and how often the older ones."""

app = typer.Typer(help="A credit ledger as a service.", no_args_is_help=True, pretty_exceptions_enable=False)
tenants_app = typer.Typer(help="Who runs a set of accounts.", no_args_is_help=True)
keys_app = typer.Typer(help="API keys.", no_args_is_help=True)
app.add_typer(tenants_app, name="tenants")
app.add_typer(keys_app, name="keys")
token_keys_app = typer.Typer(help="The keys that seal page tokens.", no_args_is_help=True)
app.add_typer(token_keys_app, name="token-keys")


def _option(name: str) -> Any:
    field = Settings.model_fields[name]
    default = "none" if field.default is None else field.default
    return typer.Option(
        f"--{name.replace('_', '-')}",
        help=f"{field.description}; else DAYBOOK_{name.upper()}, else {default}",
        show_default=False,
    )


DatabaseUrl = Annotated[str | None, _option("database_url")]
Host = Annotated[str | None, _option("host")]
Port = Annotated[int | None, _option("port")]
WorkerCount = Annotated[int | None, _option("workers")]
WorkerPortBase = Annotated[int | None, _option("worker_port_base")]
GatewayHost = Annotated[str | None, _option("gateway_host")]
GatewayPort = Annotated[int | None, _option("gateway_port")]
GatewayAdminPort = Annotated[int | None, _option("gateway_admin_port")]
ShutdownGraceSeconds = Annotated[float | None, _option("shutdown_grace_seconds")]
MetricsHost = Annotated[str | None, _option("metrics_host")]
MetricsPort = Annotated[int | None, _option("metrics_port")]
OtlpEndpoint = Annotated[str | None, _option("otlp_endpoint")]
LogLevel = Annotated[str | None, _option("log_level")]
LogFormat = Annotated[str | None, _option("log_format")]


def _settings(**flags: object) -> Settings:
    """The environment's settings with the flags that were given in their place."""
    try:
        settings = Settings(**{name: value for name, value in flags.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        for problem in error.errors():
            where = "".join(f"{part}: " for part in problem["loc"])
            typer.echo(f"daybook: {where}{problem['msg'].removeprefix('Value error, ')}", err=True)
        raise typer.Exit(2) from None
    configure_logs(settings)
    return settings


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Does the work. What is wrong is said in one line, with exit code 1, or 75 where it may be right later."""
    try:
        asyncio.run(work)
    except (CannotStart, DaybookError, ValueError) as error:
        typer.echo(f"daybook: {error}", err=True)
        raise typer.Exit(os.EX_TEMPFAIL if isinstance(error, Unavailable) else 1) from None


@contextlib.asynccontextmanager
async def _until_stopped() -> AsyncIterator[asyncio.Event]:
    """An event that SIGINT and SIGTERM set. A second signal ends the process at once."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
            # Not Python's own for SIGINT, which would unwind everything in good order.
            signal.signal(number, signal.SIG_DFL)
        stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    yield stopped


async def _first_of(*waits: Coroutine[Any, Any, object]) -> None:
    """Returns when the first of these does, and calls the others off. Raises what it raises."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    for task in done:
        task.result()


async def _for_ever() -> None:
    await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def _server(
    book: Book, settings: Settings, flags: Mapping[str, object]
) -> AsyncIterator[Callable[[], Coroutine[Any, Any, None]]]:
    """The server, in this process or in several; gives what raises CannotStart if it ends by itself."""
    if settings.workers == 1:
        async with serving(book, settings):
            yield _for_ever
        return
    await check_demo(book, settings.host)
    async with supervising(settings, flags) as workers:
        yield workers.failed


def _open(settings: Settings) -> contextlib.AbstractAsyncContextManager[Book]:
    return open_book(settings.database_url, limits=database_limits(settings), replica_url=settings.database_replica_url)


@app.command()
def serve(
    database_url: DatabaseUrl = None,
    host: Host = None,
    port: Port = None,
    workers: WorkerCount = None,
    worker_port_base: WorkerPortBase = None,
    shutdown_grace_seconds: ShutdownGraceSeconds = None,
    metrics_host: MetricsHost = None,
    metrics_port: MetricsPort = None,
    otlp_endpoint: OtlpEndpoint = None,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
) -> None:
    """Serves gRPC until SIGINT or SIGTERM. Creates and migrates the database first."""
    flags = locals()
    settings = _settings(**flags)

    async def work() -> None:
        async with _until_stopped() as stopped, _open(settings) as book, _server(book, settings, flags) as ended:
            await _first_of(stopped.wait(), ended())

    _run(work())


@app.command(hidden=True)
def worker(number: int) -> None:
    """One of the processes of `serve --workers`, which starts it."""
    settings = _settings()
    if settings.metrics_port:
        settings = settings.model_copy(update={"metrics_port": settings.metrics_port + number})
    structlog.contextvars.bind_contextvars(worker=number)
    end_with_supervisor()

    async def work() -> None:
        async with (
            _until_stopped() as stopped,
            _open(settings) as book,
            serving(book, settings, own_port=settings.worker_ports[number]),
        ):
            await stopped.wait()

    _run(work())


@app.command()
def up(
    database_url: DatabaseUrl = None,
    host: Host = None,
    port: Port = None,
    workers: WorkerCount = None,
    worker_port_base: WorkerPortBase = None,
    gateway_host: GatewayHost = None,
    gateway_port: GatewayPort = None,
    gateway_admin_port: GatewayAdminPort = None,
    shutdown_grace_seconds: ShutdownGraceSeconds = None,
    metrics_host: MetricsHost = None,
    metrics_port: MetricsPort = None,
    otlp_endpoint: OtlpEndpoint = None,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
    with_demo: Annotated[
        bool, typer.Option("--demo", help="load demo data into an empty database, and print what to try")
    ] = False,
) -> None:
    """Serves gRPC, and REST through Envoy beside it, until SIGINT or SIGTERM."""
    flags = {name: value for name, value in locals().items() if name != "with_demo"}
    if with_demo:
        flags["database_url"] = database_url or DEMO_DATABASE_URL
    settings = _settings(**flags)

    async def work() -> None:
        require_certificates(settings)
        require_free_ports(settings)
        if with_demo:
            await load_demo(settings.database_url)
        async with _until_stopped() as stopped, _open(settings) as book:
            if await book.credentials.has_demo_tenant() and not is_loopback(settings.gateway_host):
                raise CannotStart("the database holds demo data: its gateway listens on loopback only")
            async with gateway(settings) as envoy, _server(book, settings, flags) as ended:
                await _first_of(envoy.ready(), ended())
                if with_demo:
                    typer.echo(what_to_try(settings.gateway_port, settings.gateway_tls_certificate_file))
                await _first_of(stopped.wait(), ended(), envoy.process.wait())
                if not stopped.is_set():
                    raise CannotStart("the gateway ended by itself; its message is above")

    _run(work())


@app.command()
def health(
    host: Host = None,
    port: Port = None,
    service: Annotated[
        str, typer.Option(help="a service of the contracts, or empty for the process alone")
    ] = "daybook.v1.Ledger",
) -> None:
    """Asks a running server whether it can answer calls. Exits with 1 if it can't."""
    settings = _settings(host=host, port=port)

    async def work() -> None:
        if not await is_serving(f"{reachable(settings.host)}:{settings.port}", service):
            raise CannotStart("not serving")
        typer.echo("serving")

    _run(work())


def _read_server(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"([A-Za-z0-9_.-]+|\[[0-9a-fA-F:.]+\]):([0-9]{1,5})", text, re.ASCII)
    if match is None or not 1 <= int(match[2]) <= 65535:
        raise typer.BadParameter("must be a name or an address, a colon and a port, like server-1:50051")
    return match[1].strip("[]"), int(match[2])


@app.command("gateway-config")
def gateway_config(
    folder: Annotated[Path, typer.Argument(help="where to write; the gateway must find it under the same path")],
    server: Annotated[list[str], typer.Option(help="name or address and port of a server, as often as there are")],
) -> None:
    """Writes envoy.yaml, and the descriptor set that it needs, for a gateway that runs elsewhere."""
    write_deployment(folder, [_read_server(each) for each in server])
    typer.echo(f"wrote {folder / 'envoy.yaml'}")


@app.command()
def migrate(
    database_url: DatabaseUrl = None,
    distribute: Annotated[
        bool, typer.Option("--distribute", help="then spread the tables over the nodes of a PostgreSQL with citus")
    ] = False,
) -> None:
    """Creates the database, or brings it to the schema of this version."""
    settings = _settings(database_url=database_url)

    async def work() -> None:
        async with open_book(settings.database_url) as book:
            typer.echo("the database is up to date")
            if distribute:
                for name in await distribute_tables(book.database):
                    typer.echo(f"distributed {name}")

    _run(work())


@app.command()
def verify(database_url: DatabaseUrl = None) -> None:
    """Recomputes the books and prints each divergence. Exits with 1 if there is one.

    May run while the ledger is being written to.
    """
    settings = _settings(database_url=database_url)
    # To count everything may take long.
    limits = replace(database_limits(settings), statement_seconds=0)

    async def work() -> None:
        async with open_book(settings.database_url, limits=limits) as book:
            _, transaction_count = await book.verification.counts()
            progress = Progress()
            with RichProgress(console=Console(stderr=True)) as bar:
                task = bar.add_task("verifying", total=transaction_count)
                async for event in book.verification.verify_all(None):
                    if isinstance(event, Progress):
                        progress = event
                        bar.update(task, completed=event.transactions)
                    else:
                        typer.echo(
                            f"accounts/{event.account_id} {event.sequence} {event.subject}: "
                            f"expected {event.expected}, found {event.found}"
                        )
            typer.echo(
                f"{progress.accounts} accounts, {progress.transactions} transactions, {progress.findings} divergences"
            )
            if progress.findings:
                raise typer.Exit(1)

    _run(work())


@app.command()
def seed(
    rows: Annotated[int, typer.Option(help="how many transactions", min=ROWS_MIN, max=ROWS_MAX)],
    tenant: Annotated[str, typer.Option(help="the slug of the tenant, which is created")] = "seed",
    random_seed: Annotated[int, typer.Option(help="another number makes other data")] = 1,
    years: Annotated[int, typer.Option(help="over how many years", min=1, max=50)] = 3,
    until: Annotated[str | None, typer.Option(help="when they end, in RFC 3339; else with yesterday")] = None,
    database_url: DatabaseUrl = None,
    gateway_port: GatewayPort = None,
) -> None:
    """Makes a tenant with large made-up data, all of it or nothing, and prints what to try.

    One account, `hot`, has a tenth of the transactions. The same arguments make the same
    data, but for the keys. Nobody else may have a SQLite database open meanwhile.
    """
    try:
        end = system_clock() // DAY * DAY if until is None else parse_instant(until)
    except ValueError:
        raise typer.BadParameter("--until must be like 2025-01-31T12:00:00Z") from None
    if end > system_clock():
        raise typer.BadParameter("--until must not be in the future")
    settings = _settings(database_url=database_url, gateway_port=gateway_port)

    async def work() -> None:
        with RichProgress(
            *RichProgress.get_default_columns(), TextColumn("{task.completed:,}"), console=Console(stderr=True)
        ) as bar:
            task = bar.add_task("posting", total=rows)

            def report(done: int, doing: str) -> None:
                bar.update(task, completed=done, description=doing)

            uid = await load_seed(settings.database_url, Wish(tenant, rows, random_seed, end, years), report)
        async with _open_for(settings.database_url, tenant) as (book, caller):
            keys = [
                (await book.api_keys.create(caller, ApiKeyDraft(DEFAULT_SCOPES, account, "seed", None, None)))[1]
                for account in (None, HOT_ACCOUNT)
            ]
        typer.echo(
            what_to_try_with_seed(
                seed_commands(settings.gateway_port, key=keys[0], hot_key=keys[1], network=uid, until=end)
            )
        )

    _run(work())


@tenants_app.command("create")
def create_tenant(
    slug: Annotated[str, typer.Argument(help="a short name, unique")],
    display_name: Annotated[str, typer.Option(help="a name for people to read")] = "",
    database_url: DatabaseUrl = None,
) -> None:
    """Creates a tenant and prints its uid, which Spacebring clients send as network id."""
    settings = _settings(database_url=database_url)

    async def work() -> None:
        async with open_book(settings.database_url) as book:
            uid = str(uuid4())
            await book.credentials.create_tenant(
                slug=slug, uid=uid, display_name=display_name or slug, create_time=book.clock()
            )
            typer.echo(uid)

    _run(work())


Tenant = Annotated[str, typer.Option(help="the slug of the tenant")]
KeyId = Annotated[str, typer.Argument(help="the id of the key: its part before the point")]


def _read_span(text: str) -> Instant:
    """A length of time, as people write it."""
    match = re.fullmatch(r"([0-9]{1,6})([smhd])", text, re.ASCII)
    if match is None:
        raise typer.BadParameter("must be a whole number and s, m, h or d, like 90d")
    return int(match[1]) * {"s": SECOND, "m": 60 * SECOND, "h": HOUR, "d": 24 * HOUR}[match[2]]


def _read_expiry(ttl: str | None, expire_time: str | None) -> tuple[Instant | None, Instant | None]:
    """When a key expires, and after how long; at most one of them."""
    if ttl is not None and expire_time is not None:
        raise typer.BadParameter("give --ttl or --expire-time, not both")
    if ttl is not None:
        time_to_live = _read_span(ttl)
        if not SECOND <= time_to_live <= TIME_TO_LIVE_DAYS_MAX * 24 * HOUR:
            raise typer.BadParameter(f"--ttl must be between 1s and {TIME_TO_LIVE_DAYS_MAX}d")
        return None, time_to_live
    try:
        return (None if expire_time is None else parse_instant(expire_time)), None
    except ValueError:
        raise typer.BadParameter("--expire-time must be like 2025-01-31T12:00:00Z") from None


@contextlib.asynccontextmanager
async def _open_for(database_url: str, tenant: str) -> AsyncIterator[tuple[Book, Caller]]:
    """The book, and whoever runs this command as a caller who may do everything in the tenant."""
    async with open_book(database_url) as book:
        tenant_number = await book.credentials.tenant_number(tenant)
        if tenant_number is None:
            raise CannotStart(f"there is no tenant {tenant!r}")
        yield book, Caller(tenant_number, "", "daybook keys", scopes=frozenset({ADMIN}))


@keys_app.command("create")
def create_key(
    tenant: Tenant,
    account: Annotated[str | None, typer.Option(help="the id of the account to bind the key to")] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(help=f"what the key is good for, as often as needed: {', '.join(SUFFICIENT)}", show_default=False),
    ] = None,
    display_name: Annotated[str, typer.Option(help="what the key is for")] = "",
    ttl: Annotated[
        str | None, typer.Option(help="how long the key is good, like 90d; else until it is revoked")
    ] = None,
    expire_time: Annotated[str | None, typer.Option(help="instead of --ttl: when it ends, in RFC 3339")] = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Creates an API key and prints it. It can't be shown again.

    Without --scope it has `transactions` and `accounts`: all but running the ledger.
    """
    unknown = set(scope or ()) - SUFFICIENT.keys()
    if unknown:
        raise typer.BadParameter(f"there is no scope {', '.join(sorted(unknown))}")
    if len(display_name) > DISPLAY_NAME_CHARACTERS_MAX:
        raise typer.BadParameter(f"--display-name must have at most {DISPLAY_NAME_CHARACTERS_MAX} characters")
    expire_instant, time_to_live = _read_expiry(ttl, expire_time)
    settings = _settings(database_url=database_url)
    scopes = tuple(known for known in SUFFICIENT if known in (scope or DEFAULT_SCOPES))
    draft = ApiKeyDraft(scopes, account or None, display_name, expire_instant, time_to_live)

    async def work() -> None:
        async with _open_for(settings.database_url, tenant) as (book, caller):
            _, text = await book.api_keys.create(caller, draft)
            typer.echo(text)

    _run(work())


@keys_app.command("list")
def list_keys(tenant: Tenant, database_url: DatabaseUrl = None) -> None:
    """Prints the keys of a tenant, newest first, with tabs between the columns. Never their secrets."""
    settings = _settings(database_url=database_url)

    async def work() -> None:
        async with _open_for(settings.database_url, tenant) as (book, caller):
            typer.echo("id\tscopes\taccount\tcreated\texpires\trevoked\tlast used\tname")
            after: ApiKeyKey | None = None
            while True:
                page = await book.api_keys.list(caller, after, KEYS_AT_ONCE)
                for row in page.rows:
                    times = (row.create_time, row.expire_time, row.revoke_time, row.last_use_time)
                    shown = ("-" if time is None else write_instant(time) for time in times)
                    name = "".join(character if character.isprintable() else " " for character in row.display_name)
                    typer.echo("\t".join((row.id, row.scopes, row.account_id or "-", *shown, name)))
                after = page.next_key
                if after is None:
                    return

    _run(work())


@keys_app.command("revoke")
def revoke_key(key: KeyId, tenant: Tenant, database_url: DatabaseUrl = None) -> None:
    """Revokes an API key, for good. Every server refuses it within five seconds."""
    settings = _settings(database_url=database_url)

    async def work() -> None:
        async with _open_for(settings.database_url, tenant) as (book, caller):
            record = await book.api_keys.revoke(caller, key)
            assert record.revoke_time is not None
            typer.echo(f"{record.id} was revoked at {write_instant(record.revoke_time)}")

    _run(work())


@keys_app.command("rotate")
def rotate_key(
    key: KeyId,
    tenant: Tenant,
    grace_period: Annotated[str, typer.Option(help="how long the secret of before is still good, up to 30d")] = "0s",
    database_url: DatabaseUrl = None,
) -> None:
    """Gives an API key a new secret and prints the key. It can't be shown again."""
    grace = _read_span(grace_period)
    if grace > GRACE_PERIOD_DAYS_MAX * 24 * HOUR:
        raise typer.BadParameter("--grace-period must be at most 30d")
    settings = _settings(database_url=database_url)

    async def work() -> None:
        async with _open_for(settings.database_url, tenant) as (book, caller):
            _, text = await book.api_keys.rotate(caller, key, grace)
            typer.echo(text)

    _run(work())


@token_keys_app.command("rotate")
def rotate_token_key(database_url: DatabaseUrl = None) -> None:
    """Makes a new key that seals page tokens, for all tenants.

    Every server seals with it a minute later; tokens of the key before open for another day.
    """
    settings = _settings(database_url=database_url)

    async def work() -> None:
        if settings.configured_token_keys() is not None:
            raise CannotStart("page tokens are sealed with keys that are set; put a new one in front of them instead")
        async with open_book(settings.database_url) as book:
            await book.credentials.add_token_key(book.random_bytes(KEY_BYTES), book.clock())
            typer.echo("page tokens get a new key")

    _run(work())


def main() -> None:
    """Runs the command of this process's arguments."""
    # Lines appear as they are printed, also through a pipe.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # stdout is a text stream here
    # What a call makes is hardly ever in a cycle, and to look for cycles every few hundred
    # objects costs an import of history an eighth of its time.
    gc.freeze()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)
    app()


if __name__ == "__main__":
    main()
