"""The commands for accounts, their balances and their lots."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from daybook.v1 import account_pb2, transaction_pb2
from google.protobuf import json_format
from google.protobuf.message import Message

import daybook_client
from daybook_client import AccountKind
from daybook_client.conversion import to_value
from server.cli.connection import Address, Profile, connected
from server.cli.output import Limit, Output, OutputForm, print_list, print_one, read_list
from server.cli.values import account_name

app = typer.Typer()
accounts = typer.Typer(help="Accounts of a server.", no_args_is_help=True)
app.add_typer(accounts, name="accounts")
lots = typer.Typer(help="Lots: credits of an account that were added together.", no_args_is_help=True)
app.add_typer(lots, name="lots")

Account = Annotated[str, typer.Argument(help="Id or name of the account.")]
RequestId = Annotated[
    str,
    typer.Option(help="Idempotency key: a repeated command with the same key takes effect once.", show_default=False),
]


User = Annotated[str | None, typer.Option("--user", help="Person, as JSON of the contract.", show_default=False)]
Company = Annotated[str | None, typer.Option("--company", help="Company, as JSON of the contract.", show_default=False)]


class Kind(StrEnum):
    """The kinds of accounts that can be created."""

    SPACE = "SPACE"
    USER = "USER"
    COMPANY = "COMPANY"
    MEMBERSHIP = "MEMBERSHIP"
    ORGANIZATION = "ORGANIZATION"
    OTHER = "OTHER"


@accounts.command("list")
def list_accounts(
    *,
    limit: Limit = None,
    output: OutputForm = Output.TABLE,
    profile: Profile = None,
    address: Address = None,
) -> None:
    """Lists the accounts of the tenant in ascending order of their ids.

    Example: `daybook accounts list --output ndjson`
    """
    with connected(profile, address) as client:
        rows = read_list(lambda size: client.list_accounts(page_size=size), output, limit)
        print_list(output, account_pb2.Account, rows, limit)


@accounts.command("get")
def get_account(
    *,
    account: Account,
    output: OutputForm = Output.TABLE,
    profile: Profile = None,
    address: Address = None,
) -> None:
    """Shows an account.

    Example: `daybook accounts get acme`
    """
    with connected(profile, address) as client:
        print_one(output, client.get_account(account_name(account)))


@accounts.command("create")
def create_account(
    *,
    account: Annotated[str, typer.Argument(help="Id of the account.")],
    kind: Annotated[Kind, typer.Option(help=f"Kind: {', '.join(Kind)}.", case_sensitive=False)],
    display_name: Annotated[str, typer.Option(help="Name of the account for people to read.", show_default=False)] = "",
    credit_limit: Annotated[str, typer.Option(help="Largest debt, in credits.")] = "0",
    user: User = None,
    company: Company = None,
    request_id: RequestId = "",
    output: OutputForm = Output.TABLE,
    profile: Profile = None,
    address: Address = None,
) -> None:
    """Creates an account with a balance of 0, and shows it.

    Example: `daybook accounts create acme --kind company --display-name "Acme Corp."`
    """
    with connected(profile, address) as client:
        created = client.create_account(
            account,
            AccountKind(kind),
            display_name=display_name,
            credit_limit=credit_limit,
            user=_read_user(user),
            company=_read_company(company),
            request_id=request_id,
        )
        print_one(output, created)


@accounts.command("update")
def update_account(
    *,
    account: Account,
    display_name: Annotated[str | None, typer.Option(help="New name for people to read.", show_default=False)] = None,
    credit_limit: Annotated[str | None, typer.Option(help="New largest debt, in credits.", show_default=False)] = None,
    user: User = None,
    company: Company = None,
    etag: Annotated[
        str, typer.Option(help="Etag that the account must have, as `get` shows it.", show_default=False)
    ] = "",
    request_id: RequestId = "",
    output: OutputForm = Output.TABLE,
    profile: Profile = None,
    address: Address = None,
) -> None:
    """Changes the given fields of an account, and shows it.

    Example: `daybook accounts update acme --credit-limit 100`
    """
    if display_name is credit_limit is user is company is None:
        raise typer.BadParameter("give --display-name, --credit-limit, --user or --company")
    with connected(profile, address) as client:
        updated = client.update_account(
            account_name(account),
            display_name=display_name,
            credit_limit=credit_limit,
            user=_read_user(user),
            company=_read_company(company),
            etag=etag,
            request_id=request_id,
        )
        print_one(output, updated)


@app.command()
def balance(
    *,
    account: Account,
    output: OutputForm = Output.TABLE,
    profile: Profile = None,
    address: Address = None,
) -> None:
    """Shows the current balance of an account.

    Example: `daybook balance acme`
    """
    with connected(profile, address) as client:
        print_one(output, client.get_balance(account_name(account)))


@lots.command("list")
def list_lots(
    *,
    account: Account,
    limit: Limit = None,
    output: OutputForm = Output.TABLE,
    profile: Profile = None,
    address: Address = None,
) -> None:
    """Lists the lots of an account in the order of their opening, including spent and expired ones.

    Example: `daybook lots list acme`
    """
    with connected(profile, address) as client:
        name = account_name(account)
        rows = read_list(lambda size: client.list_lots(name, page_size=size), output, limit)
        print_list(output, transaction_pb2.Lot, rows, limit)


def _read_user(text: str | None) -> daybook_client.User | None:
    return None if text is None else to_value(daybook_client.User, _read_json(text, account_pb2.User(), "--user"))


def _read_company(text: str | None) -> daybook_client.Company | None:
    if text is None:
        return None
    return to_value(daybook_client.Company, _read_json(text, account_pb2.Company(), "--company"))


def _read_json(text: str, message: Message, option: str) -> Message:
    try:
        return json_format.Parse(text, message)
    except json_format.ParseError:
        names = ", ".join(str(field.json_name) for field in message.DESCRIPTOR.fields)
        raise typer.BadParameter(f"{option} must be a JSON object with some of: {names}") from None
