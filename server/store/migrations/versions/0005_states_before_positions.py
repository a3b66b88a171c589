"""The indexes by category get the state before the position, so that a scan reads transactions of one state only.

The indexes have new names, so an operator can build them in advance while servers of the previous
version run (docs/operate/upgrades.md has the statements). The migration then takes an instant.
Otherwise it builds the indexes itself. Until it ends, PostgreSQL blocks reads and writes of the table
transactions, and SQLite blocks all writes.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_REPLACED = ("transactions_by_category", "transactions_by_month_and_amount")
_KEYS = {
    "transactions_by_category_and_time": ["account_number", "kind", "category", "state", "create_time", "sequence"],
    "transactions_by_category_and_amount": [
        "account_number",
        "month",
        "kind",
        "category",
        "state",
        "amount",
        "sequence",
    ],
}


_VALID = sa.text("SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE i.indisvalid")


def upgrade() -> None:
    """Upgrades the schema to this revision."""
    connection = op.get_bind()
    found = {index["name"]: index["column_names"] for index in sa.inspect(connection).get_indexes("transactions")}
    # An index whose build was interrupted exists too, but is invalid.
    usable = set(connection.scalars(_VALID)) if connection.dialect.name == "postgresql" else set(found)
    # DROP INDEX comes first because it takes the strongest lock: taking a weaker one before it could deadlock.
    for name in _REPLACED:
        op.drop_index(name, "transactions")
    for name, columns in _KEYS.items():
        if name in usable and found.get(name) == columns:
            continue
        if name in found:
            op.drop_index(name, "transactions")
        op.create_index(name, "transactions", columns, unique=False)
