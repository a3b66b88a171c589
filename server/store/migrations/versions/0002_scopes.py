"""Every scope of an API key is written down.

A key without any was good for reading and posting, and so was one with `admin`, which now
includes that by itself.
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Goes to this revision."""
    op.execute("UPDATE api_keys SET scopes = 'transactions accounts' WHERE scopes = ''")
