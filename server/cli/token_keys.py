"""The commands for the keys that seal page tokens."""

from __future__ import annotations

import typer

from server.book import open_book
from server.cli.options import DatabaseUrl, read_settings
from server.cli.running import run
from server.config import CannotStart
from server.transport.token_keys import KEY_BYTES

app = typer.Typer()
token_keys = typer.Typer(help="Keys that seal page tokens.", no_args_is_help=True)
app.add_typer(token_keys, name="token-keys")


@token_keys.command("rotate")
def rotate_token_key(database_url: DatabaseUrl = None) -> None:
    """Creates a new key that seals page tokens, for all tenants.

    Every server seals with it a minute later. Tokens of the previous key open for another day.
    """
    settings = read_settings(database_url=database_url)

    async def work() -> None:
        if settings.configured_token_keys() is not None:
            raise CannotStart("page tokens are sealed with keys that are set; put a new one in front of them instead")
        async with open_book(settings.database_url) as book:
            await book.credentials.add_token_key(book.random_bytes(KEY_BYTES), book.clock())
            typer.echo("page tokens get a new key")

    run(work())
