"""Indexes of open lots in spending order and by expire_time, for accounts with many open lots.

The migration does not fill the new columns. If a row's counted_sequence differs from its sequence,
a read computes them and the account's next posting stores them, so servers of the previous version
can continue to post. lots_open keeps its name because the statements of those servers name it.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007_since_0006"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Upgrades the schema to this revision."""
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
