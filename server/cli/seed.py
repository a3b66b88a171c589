"""The command that generates large data."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TextColumn

from server.book import system_clock
from server.cli.options import DatabaseUrl, GatewayPort, read_settings
from server.cli.running import run
from server.cli.tenants import open_for
from server.demo.guide import Gateway
from server.ledger.access import DEFAULT_SCOPES
from server.ledger.instants import parse as parse_instant
from server.seed.guide import what_to_try
from server.seed.history import DAY
from server.seed.load import HOT_ACCOUNT, ROWS_MAX, ROWS_MIN, Parameters, load
from server.usecases.api_keys import ApiKeyDraft

app = typer.Typer()


@app.command()
def seed(
    rows: Annotated[int, typer.Option(help="Number of transactions.", min=ROWS_MIN, max=ROWS_MAX)],
    tenant: Annotated[str, typer.Option(help="Slug of the tenant to create.")] = "seed",
    random_seed: Annotated[int, typer.Option(help="Seed of the random generator.")] = 1,
    years: Annotated[int, typer.Option(help="Length of the history, in years.", min=1, max=50)] = 3,
    until: Annotated[
        str | None, typer.Option(help="End of the history as an RFC 3339 time; by default, yesterday.")
    ] = None,
    database_url: DatabaseUrl = None,
    gateway_port: GatewayPort = None,
) -> None:
    """Creates a tenant with a large, generated history, and prints what to try.

    The data is created completely or not at all. One account, `hot`, has a tenth of the
    transactions. The same arguments create the same data, except for the keys. No other
    process may have a SQLite database open at the same time.
    """
    try:
        end = system_clock() // DAY * DAY if until is None else parse_instant(until)
    except ValueError:
        raise typer.BadParameter("--until must be like 2025-01-31T12:00:00Z") from None
    if end > system_clock():
        raise typer.BadParameter("--until must not be in the future")
    settings = read_settings(database_url=database_url, gateway_port=gateway_port)

    async def work() -> None:
        with Progress(
            *Progress.get_default_columns(), TextColumn("{task.completed:,}"), console=Console(stderr=True)
        ) as bar:
            task = bar.add_task("posting", total=rows)

            def report(done: int, doing: str) -> None:
                bar.update(task, completed=done, description=doing)

            uid = await load(settings.database_url, Parameters(tenant, rows, random_seed, end, years), report)
        async with open_for(settings.database_url, tenant) as (book, caller):
            keys = [
                (await book.api_keys.create(caller, ApiKeyDraft(DEFAULT_SCOPES, account, "seed", None, None)))[1]
                for account in (None, HOT_ACCOUNT)
            ]
        gateway = Gateway(settings.gateway_port, settings.gateway_host)
        typer.echo(what_to_try(gateway, key=keys[0], hot_key=keys[1], network=uid, until=end))

    run(work())
