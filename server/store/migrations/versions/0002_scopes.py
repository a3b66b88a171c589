"""Every scope of an API key is written down.

Before, a key without scopes could read and post; it gets these scopes. A key with only `admin`
could do so too, and still can, because `admin` now includes every scope.
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Upgrades the schema to this revision."""
    op.execute("UPDATE api_keys SET scopes = 'transactions accounts' WHERE scopes = ''")
