"""API keys get a name, an expire_time and a last_use_time, and can be revoked and rotated."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Upgrades the schema to this revision."""
    op.add_column("api_keys", sa.Column("display_name", sa.String(length=255), server_default="", nullable=False))
    op.add_column("api_keys", sa.Column("expire_time", sa.BigInteger(), nullable=True))
    op.add_column("api_keys", sa.Column("revoke_time", sa.BigInteger(), nullable=True))
    op.add_column("api_keys", sa.Column("last_use_time", sa.BigInteger(), nullable=True))
    op.create_index("api_keys_of_tenant", "api_keys", ["tenant_number", "create_time", "id"], unique=False)
    op.create_table(
        "retired_secrets",
        sa.Column("key_id", sa.String(length=64), nullable=False),
        sa.Column("secret_hash", sa.LargeBinary(length=32), nullable=False),
        sa.Column("expire_time", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], name=op.f("retired_secrets_key_id_fkey")),
        sa.PrimaryKeyConstraint("key_id", "secret_hash", name=op.f("retired_secrets_pkey")),
    )
