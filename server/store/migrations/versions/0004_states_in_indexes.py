"""The indexes by category get the column state, because the lists of a facade leave out failed transactions."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_KEYS = {
    "transactions_by_category": ["account_number", "kind", "category", "create_time", "sequence"],
    "transactions_by_month_and_amount": ["account_number", "month", "kind", "category", "amount", "sequence"],
}


def upgrade() -> None:
    """Upgrades the schema to this revision."""
    for name, columns in _KEYS.items():
        op.drop_index(name, "transactions")
        op.create_index(name, "transactions", [*columns, "state"], unique=False)
