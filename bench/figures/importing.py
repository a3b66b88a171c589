"""Figure 14: the speed of an import."""

from __future__ import annotations

import time
from statistics import median

from daybook.v1.account_pb2 import Account

from bench.comparison import spread
from bench.ledger import as_messages, build, create_accounts, import_history, inference, mixed_history
from bench.load import LoadFailed
from bench.report import Finding, at_least
from bench.servers import daybook
from bench.stage import Stage

ROWS_PER_SECOND_MIN = 8000


def measure(stage: Stage) -> list[Finding]:
    """Measures the rows per second of one ImportTransactions call into a new database."""
    account_ids = [f"imported-{number}" for number in range(stage.pool_size)]
    messages = list(as_messages(mixed_history(account_ids, stage.rows_imported, inference)))
    rates = []
    for _ in range(stage.rounds.at_least):
        ledger = build(stage.new_sqlite_url(), rows=1)
        with daybook(ledger.database_url) as server:
            create_accounts(server, ledger.key, Account.ORGANIZATION, account_ids)
            start = time.monotonic()
            imported = import_history(server, ledger.key, messages)
            rates.append(imported / (time.monotonic() - start))
        if imported != stage.rows_imported:
            raise LoadFailed(f"{imported} rows were imported and not {stage.rows_imported}")
    bar = at_least(ROWS_PER_SECOND_MIN)
    return [Finding(14, "import, SQLite", median(rates), "rows/s", bar, spread(rates), {"rows/s": rates})]
