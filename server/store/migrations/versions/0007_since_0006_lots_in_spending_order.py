"""Accounts with many open lots: the first to be spent or to expire are found in an index.

The new columns are not filled here. A row whose counted_sequence is not its sequence has them
worked out when it is read, and filled when the account is next posted to; so servers of the
version before can go on posting meanwhile. lots_open keeps its name because they name it.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007_since_0006"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Goes to this revision."""
    for name in ("open_lot_count", "expiring", "counted_sequence"):
        op.add_column("account_states", sa.Column(name, sa.BigInteger(), server_default="0", nullable=False))
    is_open = sa.text("remaining > 0")
    can_expire = sa.text("remaining > 0 AND expire_time IS NOT NULL")
    op.drop_index("lots_open", "lots")
    op.create_index(
        "lots_open",
        "lots",
        ["account_number", "priority", sa.text("coalesce(expire_time, 9223372036854775807)"), "number"],
        unique=False,
        sqlite_where=is_open,
        postgresql_where=is_open,
    )
    op.create_index(
        "lots_expiring",
        "lots",
        ["account_number", "expire_time", "number"],
        unique=False,
        sqlite_where=can_expire,
        postgresql_where=can_expire,
    )
