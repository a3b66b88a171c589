"""The commands that work on the whole database."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress as ProgressBar

from server.book import database_limits, open_book
from server.cli.options import DatabaseUrl, read_settings
from server.cli.running import run
from server.store.database import Database
from server.usecases.verification import Progress

app = typer.Typer()


@app.command()
def migrate(
    database_url: DatabaseUrl = None,
    distribute: Annotated[
        bool,
        typer.Option("--distribute", help="Distribution of the tables over the nodes of Citus, after the migration."),
    ] = False,
) -> None:
    """Creates the database, or migrates it to the schema of this version."""
    settings = read_settings(database_url=database_url)

    async def work() -> None:
        async with open_book(settings.database_url) as book:
            typer.echo("the database is up to date")
            if distribute:
                # Loaded only for PostgreSQL.
                from server.store.distribute import distribute as distribute_tables  # noqa: PLC0415

                for name in await distribute_tables(book.database):
                    typer.echo(f"distributed {name}")

    run(work())


@app.command()
def verify(database_url: DatabaseUrl = None) -> None:
    """Recomputes the books and prints each divergence. Exits with 1 if there is one.

    May run while the ledger is being written to.
    """
    settings = read_settings(database_url=database_url)
    # Counting all rows may take longer than the timeout.
    limits = replace(database_limits(settings), statement_seconds=0)

    async def work() -> None:
        async with open_book(settings.database_url, limits=limits) as book:
            _, transaction_count = await book.verification.counts()
            progress = Progress()
            with ProgressBar(console=Console(stderr=True)) as bar:
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


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="File to create; its folder must exist.")],
    database_url: DatabaseUrl = None,
) -> None:
    """Copies a SQLite database to a new file while servers use it.

    The copy has every transaction that was acknowledged before the command began. Use pg_dump or
    pg_basebackup for PostgreSQL.
    """
    settings = read_settings(database_url=database_url)

    async def work() -> None:
        # Not a book, which would migrate the database.
        database = Database(settings.database_url)
        try:
            await database.primary.back_up(file)
        finally:
            await database.close()
        typer.echo(f"copied {file.stat().st_size} bytes to {file}")

    run(work())
