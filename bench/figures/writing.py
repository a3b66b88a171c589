"""Figures 6 to 8: posting with durable commits."""

from __future__ import annotations

from statistics import median

from daybook.v1.ledger_service_pb2 import BatchCreateTransactionsRequest, CreateTransactionRequest
from daybook.v1.transaction_pb2 import Transaction, Usage

from bench.calls import BATCH_CREATE, CREATE, Call, list_call, read_page
from bench.comparison import spread
from bench.ledger import WRITERS, Ledger
from bench.load import LoadFailed
from bench.report import Finding, at_least
from bench.servers import Server, ceiling, daybook
from bench.stage import Stage

CALLERS = 64
_STREAMS = CALLERS // len(WRITERS)
BATCH = 500
BATCH_CALLERS = 8
BATCHED_PER_SECOND_MIN = 15_000
BATCHED_TO_SINGLE_MIN = 4
# The fraction of the answered calls that must be posted: the clocks of the generator and the bench differ a little.
_POSTED_MIN = 0.9


def to_ceiling(stage: Stage) -> list[Finding]:
    """Measures figure 6."""
    ledger = stage.fresh_sqlite()
    call = create_call(ledger)
    with daybook(ledger.database_url) as server, ceiling(b"") as bare:
        compared = stage.compare(
            lambda: _posted_per_second(stage, server, ledger, call),
            lambda: call.rate(bare.port, stage.seconds, clients=len(WRITERS), streams=_STREAMS),
        )
    return [
        Finding(
            6,
            "CreateTransaction, SQLite",
            compared.ratio,
            "",
            at_least(0.35),
            compared.spread,
            {"daybook/s": compared.above, "ceiling/s": compared.below},
        )
    ]


def to_one_at_a_time(stage: Stage) -> list[Finding]:
    """Measures figure 7."""
    ledger, other = stage.fresh_sqlite(), stage.fresh_sqlite()
    with daybook(ledger.database_url) as server, daybook(other.database_url, one_at_a_time=True) as single:
        compared = stage.compare(
            lambda: _posted_per_second(stage, server, ledger, create_call(ledger)),
            lambda: _posted_per_second(stage, single, other, create_call(other)),
        )
    return [
        Finding(
            7,
            "CreateTransaction, SQLite",
            compared.ratio,
            "",
            at_least(3),
            compared.spread,
            {"group commit/s": compared.above, "one commit a call/s": compared.below},
        )
    ]


def batches(stage: Stage) -> list[Finding]:
    """Measures figure 8. The bar is the lower of a fixed rate and a multiple of the rate of single calls."""
    ledger = stage.fresh_sqlite()
    create, batch = create_call(ledger), batch_call(ledger)
    with daybook(ledger.database_url) as server:
        compared = stage.compare(
            # Twice as long, because large batches in flight at the end are not counted.
            lambda: BATCH * batch.rate(server.port, 2 * stage.seconds, clients=BATCH_CALLERS, streams=1),
            lambda: _posted_per_second(stage, server, ledger, create),
        )
        if len(batch.answers(server.port)) != 1:
            raise LoadFailed("a batch is refused after the load")
    return [
        Finding(
            8,
            f"batches of {BATCH}, SQLite",
            median(compared.above),
            "transactions/s",
            at_least(min(BATCHED_PER_SECOND_MIN, BATCHED_TO_SINGLE_MIN * median(compared.below))),
            spread(compared.above),
            {"in batches/s": compared.above, "one a call/s": compared.below},
        )
    ]


def charge_of(account_id: str) -> CreateTransactionRequest:
    """Returns a request that charges an account."""
    # Without a request_id every call posts, although h2load sends the same bytes each time.
    return CreateTransactionRequest(
        parent=f"accounts/{account_id}",
        transaction=Transaction(
            kind=Transaction.CHARGE,
            category="inference",
            amount="-0.01",
            usage=Usage(model="example-large", input_tokens=1800, output_tokens=420),
        ),
    )


def create_call(ledger: Ledger) -> Call:
    """Returns a call with one charge for each of the WRITERS."""
    return Call.of(CREATE, *(charge_of(account_id) for account_id in WRITERS), key=ledger.key)


def batch_call(ledger: Ledger) -> Call:
    """Returns a call with one batch of charges for each of the WRITERS."""
    requests = (
        BatchCreateTransactionsRequest(parent=f"accounts/{account_id}", requests=[charge_of(account_id)] * BATCH)
        for account_id in WRITERS
    )
    return Call.of(BATCH_CREATE, *requests, key=ledger.key)


def _posted_per_second(stage: Stage, server: Server, ledger: Ledger, call: Call) -> float:
    """Returns the answered calls per second. Raises LoadFailed unless all of them posted."""
    before = posted(server.port, ledger)
    rate = call.rate(server.port, stage.seconds, clients=len(WRITERS), streams=_STREAMS)
    count = posted(server.port, ledger) - before
    # Calls in flight when h2load ends are posted, but don't count as answered.
    if count < rate * stage.seconds * _POSTED_MIN:
        raise LoadFailed(f"{rate:.0f} calls a second were answered, and only {count} transactions posted")
    return rate


def posted(port: int, ledger: Ledger) -> int:
    """Returns the number of transactions of the WRITERS: the sum of their newest sequences."""
    return sum(
        read_page(list_call(ledger.key, account_id, page_size=1).answers(port)[0], 1).transactions[0].sequence
        for account_id in WRITERS
    )
