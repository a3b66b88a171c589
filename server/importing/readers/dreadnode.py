"""Dreadnode's `GET /api/v1/org/{org}/credits/transactions`, which has no pages, and its balance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Any

from daybook.v1.transaction_pb2 import Transaction

from daybook_client import AccountKind, NewTransaction, PastTransaction, TransactionKind, Usage
from server.facades.dreadnode import LIMIT_MAX, TYPES
from server.importing import fields
from server.importing.found import (
    Difference,
    Found,
    NewAccount,
    Options,
    Page,
    Problem,
    Reader,
    Row,
    RowInvalid,
    ShownBalance,
    bearer,
)
from server.importing.http import Api

# Refunds are adjustments, because a row doesn't name the charge that it refunds.
KINDS = {
    name: (TransactionKind(Transaction.Kind.Name(kind)), category)
    for (kind, category), name in TYPES.items()
    if kind != Transaction.REFUND
}


def pages(api: Api, options: Options) -> Iterator[Page]:
    """Reads the balance, then the newest rows of all types, and then of each type: the API shows no older ones."""
    path = f"/api/v1/org/{options.account_id}/credits"
    yield Page(api.place(path, 1), api.get(path))
    path += "/transactions"
    for number, types in enumerate(({}, *({"transaction_type": name} for name in KINDS)), 1):
        yield Page(api.place(path, number), api.get(path, limit=LIMIT_MAX, **types))


def rows(pages: Iterable[Page], options: Options) -> Iterator[Found]:
    """Reads rows of lists, and balances."""
    organization = options.account_id
    yield NewAccount(id=organization, kind=AccountKind.ORGANIZATION)
    for page in pages:
        if fields.member(page.content, "balance") is not None:
            yield ShownBalance(organization, fields.required_number(page.content, "balance"))
            continue
        listed = fields.rows_of(page.place, page.content)
        if len(listed) == LIMIT_MAX:
            yield Difference(page.place, f"has {LIMIT_MAX} rows; the API shows no older ones")
        for number, listed_row in enumerate(listed, 1):
            place = f"{page.place}, row {number}"
            try:
                yield from _row(organization, place, listed_row)
            except RowInvalid as error:
                yield Problem(place, str(error))


def _row(organization: str, place: str, listed: Any) -> Iterator[Found]:
    kind, category = fields.one_of(listed, "transaction_type", KINDS)
    # Amounts are rounded to whole credits, so 0 stands for less than half a credit.
    amount = fields.required_number(listed, "amount") or _smallest(kind)
    id_ = fields.required(listed, "id")
    cost = fields.number(listed, "inference_cost_usd")
    usage = Usage(
        model=fields.text(listed, "model"),
        input_tokens=fields.integer(listed, "input_tokens"),
        output_tokens=fields.integer(listed, "output_tokens"),
        cost_usd=cost,
    )
    has_usage = usage != Usage()
    transaction = NewTransaction(
        kind,
        category,
        amount,
        description=fields.text(listed, "description"),
        # The API shows only that there is a receipt.
        receipt_uri=f"urn:dreadnode:{id_}" if fields.member(listed, "has_receipt") else "",
        usage=usage if has_usage and kind == TransactionKind.CHARGE else None,
    )
    time = fields.required_time(listed, "created_at")
    yield Row(PastTransaction(f"accounts/{organization}", transaction, time, f"dreadnode:{id_}"), place=place)
    if has_usage and kind != TransactionKind.CHARGE:
        yield Difference(place, "shows no model, tokens and cost: only charges have them")


def _smallest(kind: TransactionKind) -> Decimal:
    return -fields.ZERO_SHOWN if kind == TransactionKind.CHARGE else fields.ZERO_SHOWN


READER = Reader("Dreadnode", "", bearer, pages, rows, needs_account=True)
