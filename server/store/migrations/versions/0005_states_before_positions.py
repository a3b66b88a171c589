"""Lists of categories walk the transactions of one state, so that they pass over none of the others.

The indexes have new names. So an operator can build them beforehand while servers of the
version before go on (docs/operate/upgrades.md has the statements), and this takes an instant.
Else it builds them itself: in PostgreSQL nobody reads or writes transactions meanwhile, in
SQLite nobody writes.
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
    """Goes to this revision."""
    connection = op.get_bind()
    found = {index["name"]: index["column_names"] for index in sa.inspect(connection).get_indexes("transactions")}
    # One that was given up on while it was built is there as well, but serves nobody.
    usable = set(connection.scalars(_VALID)) if connection.dialect.name == "postgresql" else set(found)
    # The lock that this takes is the strongest there is: whoever takes a weaker one first,
    # and this one later, may wait for somebody who waits for them.
    for name in _REPLACED:
        op.drop_index(name, "transactions")
    for name, columns in _KEYS.items():
        if name in usable and found.get(name) == columns:
            continue
        if name in found:
            op.drop_index(name, "transactions")
        op.create_index(name, "transactions", columns, unique=False)
