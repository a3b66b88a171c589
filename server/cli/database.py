"""The commands that work on the whole database."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress as RichProgress
from rich.progress import TextColumn

from server.app import database_limits, open_book, system_clock
from server.cli.options import DatabaseUrl, GatewayPort, read_settings
from server.cli.running import run
from server.cli.tenants import open_for
from server.ledger.access import DEFAULT_SCOPES
from server.ledger.instants import parse as parse_instant
from server.seed.guide import commands as seed_commands
from server.seed.guide import what_to_try as what_to_try_with_seed
from server.seed.history import DAY
from server.seed.load import HOT_ACCOUNT, ROWS_MAX, ROWS_MIN, Wish
from server.seed.load import load as load_seed
from server.store.distribute import distribute as distribute_tables
from server.usecases.api_keys import ApiKeyDraft
from server.usecases.verification import Progress


def migrate(
    database_url: DatabaseUrl = None,
    distribute: Annotated[
        bool, typer.Option("--distribute", help="then spread the tables over the nodes of a PostgreSQL with citus")
    ] = False,
) -> None:
    """Creates the database, or brings it to the schema of this version."""
    settings = read_settings(database_url=database_url)

    async def work() -> None:
        async with open_book(settings.database_url) as book:
            typer.echo("the database is up to date")
            if distribute:
                for name in await distribute_tables(book.database):
                    typer.echo(f"distributed {name}")

    run(work())


def verify(database_url: DatabaseUrl = None) -> None:
    """Recomputes the books and prints each divergence. Exits with 1 if there is one.

    May run while the ledger is being written to.
    """
    settings = read_settings(database_url=database_url)
    # To count everything may take long.
    limits = replace(database_limits(settings), statement_seconds=0)

    async def work() -> None:
        async with open_book(settings.database_url, limits=limits) as book:
            _, transaction_count = await book.verification.counts()
            progress = Progress()
            with RichProgress(console=Console(stderr=True)) as bar:
                task = bar.add_task("verifying", total=transaction_count)
                async with aclosing(book.verification.verify_all(None)) as events:
                    async for event in events:
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

    run(work())


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
    settings = read_settings(database_url=database_url, gateway_port=gateway_port)

    async def work() -> None:
        with RichProgress(
            *RichProgress.get_default_columns(), TextColumn("{task.completed:,}"), console=Console(stderr=True)
        ) as bar:
            task = bar.add_task("posting", total=rows)

            def report(done: int, doing: str) -> None:
                bar.update(task, completed=done, description=doing)

            uid = await load_seed(settings.database_url, Wish(tenant, rows, random_seed, end, years), report)
        async with open_for(settings.database_url, tenant) as (book, caller):
            keys = [
                (await book.api_keys.create(caller, ApiKeyDraft(DEFAULT_SCOPES, account, "seed", None, None)))[1]
                for account in (None, HOT_ACCOUNT)
            ]
        typer.echo(
            what_to_try_with_seed(
                seed_commands(
                    settings.gateway_port, settings.gateway_host, key=keys[0], hot_key=keys[1], network=uid, until=end
                )
            )
        )

    run(work())
