"""The commands for tenants."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Annotated
from uuid import uuid4

import typer

from server.book import Book, open_book
from server.cli.options import DatabaseUrl, read_settings
from server.cli.running import run
from server.cli.values import printable
from server.config import CannotStart
from server.ledger.access import ADMIN, Caller
from server.ledger.instants import write as write_instant

TENANTS_AT_ONCE = 500

app = typer.Typer()
tenants = typer.Typer(help="Tenants: each runs a set of accounts.", no_args_is_help=True)
app.add_typer(tenants, name="tenants")


@tenants.command("create")
def create_tenant(
    slug: Annotated[str, typer.Argument(help="Short, unique name of the tenant.")],
    display_name: Annotated[str, typer.Option(help="Name of the tenant for people to read.")] = "",
    database_url: DatabaseUrl = None,
) -> None:
    """Creates a tenant and prints its uid, which Spacebring clients send as network id."""
    settings = read_settings(database_url=database_url)

    async def work() -> None:
        async with open_book(settings.database_url) as book:
            uid = str(uuid4())
            await book.credentials.create_tenant(
                slug=slug, uid=uid, display_name=display_name or slug, create_time=book.clock()
            )
            typer.echo(uid)

    run(work())


@tenants.command("list")
def list_tenants(database_url: DatabaseUrl = None) -> None:
    """Prints all tenants, oldest first, with tabs between the columns.

    Clients of the Spacebring facade send the uid as network id.
    """
    settings = read_settings(database_url=database_url)

    async def work() -> None:
        async with open_book(settings.database_url) as book:
            typer.echo("slug\tuid\tcreated\tname")
            after = 0
            while page := await book.credentials.tenants(after, TENANTS_AT_ONCE):
                for row in page:
                    typer.echo(
                        "\t".join((row.slug, row.uid, write_instant(row.create_time), printable(row.display_name)))
                    )
                after = page[-1].number

    run(work())


@contextlib.asynccontextmanager
async def open_for(database_url: str, tenant: str) -> AsyncIterator[tuple[Book, Caller]]:
    """The book, and a caller with every scope in the tenant. Raises CannotStart if there is no such tenant."""
    async with open_book(database_url) as book:
        tenant_number = await book.credentials.tenant_number(tenant)
        if tenant_number is None:
            raise CannotStart(f"there is no tenant {tenant!r}")
        yield book, Caller(tenant_number, "", "daybook keys", scopes=frozenset({ADMIN}))
