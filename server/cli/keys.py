"""The commands for API keys, and for the keys that seal page tokens."""

from __future__ import annotations

from typing import Annotated

import typer

from server.book import open_book
from server.cli.options import DatabaseUrl, read_settings
from server.cli.running import run
from server.cli.tenants import open_for
from server.cli.values import printable, read_span
from server.config import CannotStart
from server.ledger.access import DEFAULT_SCOPES, SUFFICIENT
from server.ledger.instants import HOUR, SECOND, Instant
from server.ledger.instants import parse as parse_instant
from server.ledger.instants import write as write_instant
from server.ledger.paging import ApiKeyKey
from server.transport.token_keys import KEY_BYTES
from server.transport.validation import DISPLAY_NAME_CHARACTERS_MAX, GRACE_PERIOD_DAYS_MAX, TIME_TO_LIVE_DAYS_MAX
from server.usecases.api_keys import ApiKeyDraft

KEYS_AT_ONCE = 500

app = typer.Typer()
keys = typer.Typer(help="API keys.", no_args_is_help=True)
app.add_typer(keys, name="keys")
token_keys = typer.Typer(help="Keys that seal page tokens.", no_args_is_help=True)
app.add_typer(token_keys, name="token-keys")

Tenant = Annotated[str, typer.Option(help="Slug of the tenant.")]
KeyId = Annotated[str, typer.Argument(help="Id of the key: the part before its dot.")]


def _read_expiry(ttl: str | None, expire_time: str | None) -> tuple[Instant | None, Instant | None]:
    """The expiry and the lifetime of a key; at most one of them is set. Raises BadParameter."""
    if ttl is not None and expire_time is not None:
        raise typer.BadParameter("give --ttl or --expire-time, not both")
    if ttl is not None:
        time_to_live = read_span(ttl)
        if not SECOND <= time_to_live <= TIME_TO_LIVE_DAYS_MAX * 24 * HOUR:
            raise typer.BadParameter(f"--ttl must be between 1s and {TIME_TO_LIVE_DAYS_MAX}d")
        return None, time_to_live
    try:
        return (None if expire_time is None else parse_instant(expire_time)), None
    except ValueError:
        raise typer.BadParameter("--expire-time must be like 2025-01-31T12:00:00Z") from None


@keys.command("create")
def create_key(
    tenant: Tenant,
    account: Annotated[str | None, typer.Option(help="Id of the account to bind the key to.")] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(help=f"Scope of the key; may be repeated: {', '.join(SUFFICIENT)}.", show_default=False),
    ] = None,
    display_name: Annotated[str, typer.Option(help="Name of the key for people to read.")] = "",
    ttl: Annotated[
        str | None, typer.Option(help="Lifetime of the key, like 90d; by default, until it is revoked.")
    ] = None,
    expire_time: Annotated[
        str | None, typer.Option(help="Expiry of the key as an RFC 3339 time, instead of --ttl.")
    ] = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Creates an API key and prints it. It can't be shown again.

    Without --scope it has `transactions` and `accounts`: everything but administration.
    """
    unknown = set(scope or ()) - SUFFICIENT.keys()
    if unknown:
        raise typer.BadParameter(
            f"there is no scope {', '.join(sorted(unknown))}; the scopes are {', '.join(SUFFICIENT)}"
        )
    if len(display_name) > DISPLAY_NAME_CHARACTERS_MAX:
        raise typer.BadParameter(f"--display-name must have at most {DISPLAY_NAME_CHARACTERS_MAX} characters")
    expire_instant, time_to_live = _read_expiry(ttl, expire_time)
    settings = read_settings(database_url=database_url)
    scopes = tuple(known for known in SUFFICIENT if known in (scope or DEFAULT_SCOPES))
    draft = ApiKeyDraft(scopes, account or None, display_name, expire_instant, time_to_live)

    async def work() -> None:
        async with open_for(settings.database_url, tenant) as (book, caller):
            _, text = await book.api_keys.create(caller, draft)
            typer.echo(text)

    run(work())


@keys.command("list")
def list_keys(tenant: Tenant, database_url: DatabaseUrl = None) -> None:
    """Prints the keys of a tenant, newest first, with tabs between the columns. Never their secrets."""
    settings = read_settings(database_url=database_url)

    async def work() -> None:
        async with open_for(settings.database_url, tenant) as (book, caller):
            typer.echo("id\tscopes\taccount\tcreated\texpires\trevoked\tlast used\tname")
            after: ApiKeyKey | None = None
            while True:
                page = await book.api_keys.list(caller, after, KEYS_AT_ONCE)
                for row in page.rows:
                    times = (row.create_time, row.expire_time, row.revoke_time, row.last_use_time)
                    shown = ("-" if time is None else write_instant(time) for time in times)
                    columns = (row.id, row.scopes, row.account_id or "-", *shown, printable(row.display_name))
                    typer.echo("\t".join(columns))
                after = page.next_key
                if after is None:
                    return

    run(work())


@keys.command("revoke")
def revoke_key(key: KeyId, tenant: Tenant, database_url: DatabaseUrl = None) -> None:
    """Revokes an API key permanently. Every server refuses it within five seconds."""
    settings = read_settings(database_url=database_url)

    async def work() -> None:
        async with open_for(settings.database_url, tenant) as (book, caller):
            record = await book.api_keys.revoke(caller, key)
            assert record.revoke_time is not None
            typer.echo(f"{record.id} was revoked at {write_instant(record.revoke_time)}")

    run(work())


@keys.command("rotate")
def rotate_key(
    key: KeyId,
    tenant: Tenant,
    grace_period: Annotated[
        str, typer.Option(help="Grace period of the previous secret, like 12h; at most 30d.")
    ] = "0s",
    database_url: DatabaseUrl = None,
) -> None:
    """Gives an API key a new secret and prints the key. It can't be shown again."""
    grace = read_span(grace_period)
    if grace > GRACE_PERIOD_DAYS_MAX * 24 * HOUR:
        raise typer.BadParameter("--grace-period must be at most 30d")
    settings = read_settings(database_url=database_url)

    async def work() -> None:
        async with open_for(settings.database_url, tenant) as (book, caller):
            _, text = await book.api_keys.rotate(caller, key, grace)
            typer.echo(text)

    run(work())


@token_keys.command("rotate")
def rotate_token_key(database_url: DatabaseUrl = None) -> None:
    """Creates a new key that seals page tokens, for all tenants.

    Servers seal with the new key after a minute. Tokens of the previous key stay valid for a day.
    """
    settings = read_settings(database_url=database_url)

    async def work() -> None:
        if settings.configured_token_keys() is not None:
            raise CannotStart(
                "the settings have the keys of page tokens: put a new key in front of the configured ones"
            )
        async with open_book(settings.database_url) as book:
            await book.credentials.add_token_key(book.random_bytes(KEY_BYTES), book.clock())
            typer.echo("created a new key for page tokens")

    run(work())
