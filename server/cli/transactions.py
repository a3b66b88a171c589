"""The commands for transactions."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Annotated

import typer
from daybook.v1 import transaction_pb2

from daybook_client import NewTransaction, TransactionKind, TransactionView
from server.cli.accounts import Account, RequestId
from server.cli.connection import Address, Profile, connected
from server.cli.output import Limit, Output, OutputForm, print_list, print_one, read_list
from server.cli.values import account_name, read_pairs, read_span, read_time, transaction_name
from server.transport.validation import PRIORITY_MAX

app = typer.Typer()
transactions = typer.Typer(help="Transactions of a server.", no_args_is_help=True)
app.add_typer(transactions, name="transactions")

Transaction = Annotated[
    str,
    typer.Argument(
        help="Name of the transaction, or its account and its uid with a slash between them.",
        parser=transaction_name,
        metavar="transaction",
    ),
]
Filter = Annotated[
    str, typer.Option("--filter", help="Filter, like 'kind = CHARGE'; see docs/paging.md.", show_default=False)
]
OrderBy = Annotated[
    str,
    typer.Option(
        help="Order: create_time or amount, and optionally desc; by default, newest first.", show_default=False
    ),
]
Amount = Annotated[str, typer.Option(help="Credits, an exact decimal above 0.")]
Description = Annotated[str, typer.Option(help="Memo for people to read.", show_default=False)]
Labels = Annotated[
    list[str] | None, typer.Option("--label", help="Label, like location=berlin; may be repeated.", show_default=False)
]


class Kind(StrEnum):
    """The kinds of transactions that can be recorded."""

    GRANT = "GRANT"
    CHARGE = "CHARGE"
    ADJUSTMENT = "ADJUSTMENT"


@transactions.command("list")
def list_transactions(
    *,
    account: Annotated[
        str, typer.Argument(help="Id or name of the account; by default, all.", show_default=False)
    ] = "-",
    expression: Filter = "",
    order_by: OrderBy = "",
    limit: Limit = None,
    output: OutputForm = Output.TABLE,
    profile: Profile = None,
    address: Address = None,
) -> None:
    """Lists the transactions of an account or of the tenant, newest first.

    Example: `daybook transactions list acme --filter 'kind = CHARGE' --limit 20`
    """
    with connected(profile, address) as client:
        name = account_name(account)
        rows = read_list(
            lambda size: client.list_transactions(name, filter=expression, order_by=order_by, page_size=size),
            output,
            limit,
        )
        print_list(output, transaction_pb2.Transaction, rows, limit)


@transactions.command("get")
def get_transaction(
    *,
    transaction: Transaction,
    output: OutputForm = Output.TABLE,
    profile: Profile = None,
    address: Address = None,
) -> None:
    """Shows a transaction, with the lots that it took credits from or added them to.

    Example: `daybook transactions get acme/0192f3a4-5b6c-7d8e-9f01-23456789abcd`
    """
    with connected(profile, address) as client:
        print_one(output, client.get_transaction(transaction, view=TransactionView.FULL))


@transactions.command("record")
def record_transaction(
    *,
    account: Account,
    kind: Annotated[Kind, typer.Option(help=f"Kind: {', '.join(Kind)}.", case_sensitive=False)],
    category: Annotated[str, typer.Option(help="Reason in your own terms, like inference.")],
    amount: Annotated[str, typer.Option(help="Credits, an exact decimal: above 0 for a grant, below 0 for a charge.")],
    description: Description = "",
    label: Labels = None,
    receipt_uri: Annotated[str, typer.Option(help="URI of a receipt or an invoice.", show_default=False)] = "",
    metadata: Annotated[str | None, typer.Option(help="Your own data, a JSON object.", show_default=False)] = None,
    expire_time: Annotated[
        datetime | None,
        typer.Option(
            help="Expiry of the credits as an RFC 3339 time.", parser=read_time, metavar="TIME", show_default=False
        ),
    ] = None,
    ttl: Annotated[
        int | None,
        typer.Option(
            help="Lifetime of the credits, like 90d; by default, unlimited.",
            parser=read_span,
            metavar="DURATION",
            show_default=False,
        ),
    ] = None,
    priority: Annotated[
        int,
        typer.Option(
            help="Spending priority of the credits; lower ones are spent first.", min=-PRIORITY_MAX, max=PRIORITY_MAX
        ),
    ] = 0,
    record_declined: Annotated[
        bool, typer.Option("--record-declined", help="Records a charge without enough credits as FAILED.")
    ] = False,
    request_id: RequestId = "",
    output: OutputForm = Output.TABLE,
    profile: Profile = None,
    address: Address = None,
) -> None:
    """Posts a grant, a charge or an adjustment, and shows it.

    Example: `daybook transactions record acme --kind charge --category inference --amount -0.25`
    """
    new = NewTransaction(
        TransactionKind(kind),
        category,
        amount,
        description=description,
        labels=read_pairs(label or ()),
        receipt_uri=receipt_uri,
        metadata=None if metadata is None else _read_object(metadata),
        expire_time=expire_time,
        ttl=None if ttl is None else timedelta(microseconds=ttl),
        priority=priority,
    )
    if expire_time is not None and ttl is not None:
        raise typer.BadParameter("give --ttl or --expire-time, not both")
    with connected(profile, address) as client:
        name = account_name(account)
        print_one(
            output,
            client.create_transaction(name, new, record_declined=record_declined, request_id=request_id),
        )


@transactions.command("refund")
def refund_transaction(
    *,
    transaction: Transaction,
    amount: Annotated[
        str | None, typer.Option(help="Credits, an exact decimal above 0; by default, the rest of the charge.")
    ] = None,
    description: Description = "",
    request_id: RequestId = "",
    output: OutputForm = Output.TABLE,
    profile: Profile = None,
    address: Address = None,
) -> None:
    """Refunds a charge or a part of it, and shows the refund.

    Example: `daybook transactions refund acme/0192f3a4-5b6c-7d8e-9f01-23456789abcd --amount 0.10`
    """
    with connected(profile, address) as client:
        refund = client.refund_transaction(transaction, amount, description=description, request_id=request_id)
        print_one(output, refund)


@transactions.command("transfer")
def transfer_credits(
    *,
    source: Annotated[str, typer.Argument(help="Id or name of the account that the credits leave.")],
    destination: Annotated[str, typer.Argument(help="Id or name of the account that the credits enter.")],
    amount: Amount,
    description: Description = "",
    label: Labels = None,
    request_id: RequestId = "",
    output: OutputForm = Output.TABLE,
    profile: Profile = None,
    address: Address = None,
) -> None:
    """Moves credits from one account to another, and lists the two transactions, the outgoing one first.

    Example: `daybook transactions transfer acme globex --amount 5`
    """
    labels = read_pairs(label or ())
    with connected(profile, address) as client:
        transfer = client.transfer_credits(
            account_name(source),
            account_name(destination),
            amount,
            description=description,
            labels=labels,
            request_id=request_id,
        )
        print_list(output, transaction_pb2.Transaction, [transfer.outgoing, transfer.incoming])


def _read_object(text: str) -> dict[str, object]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise typer.BadParameter("--metadata must be a JSON object")
    return found
