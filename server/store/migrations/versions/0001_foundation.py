"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Upgrades the schema to this revision."""
    op.create_table(
        "account_states",
        sa.Column("account_number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("balance", sa.BigInteger(), nullable=False),
        sa.Column("debt", sa.BigInteger(), nullable=False),
        sa.Column("lot_count", sa.BigInteger(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("last_hash", sa.LargeBinary(length=32), nullable=False),
        sa.Column("last_create_time", sa.BigInteger(), nullable=False),
        sa.Column("window_number", sa.BigInteger(), nullable=False),
        sa.Column("import_time", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("debt >= 0", name=op.f("account_states_debt_check")),
        sa.PrimaryKeyConstraint("account_number", name=op.f("account_states_pkey")),
    )
    op.create_table(
        "lots",
        sa.Column("account_number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("opened_by", sa.BigInteger(), nullable=False),
        sa.Column("expire_time", sa.BigInteger(), nullable=True),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.Column("remaining", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("number >= 1", name=op.f("lots_number_check")),
        sa.CheckConstraint("remaining >= 0 AND remaining <= amount", name=op.f("lots_remaining_check")),
        sa.PrimaryKeyConstraint("account_number", "number", name=op.f("lots_pkey")),
        sqlite_with_rowid=False,
    )
    op.create_index(
        "lots_due",
        "lots",
        ["expire_time", "account_number"],
        unique=False,
        sqlite_where=sa.text("remaining > 0 AND expire_time IS NOT NULL"),
        postgresql_where=sa.text("remaining > 0 AND expire_time IS NOT NULL"),
    )
    op.create_index(
        "lots_open",
        "lots",
        ["account_number", "number"],
        unique=False,
        sqlite_where=sa.text("remaining > 0"),
        postgresql_where=sa.text("remaining > 0"),
    )
    op.create_table(
        "refunds",
        sa.Column("account_number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.Column("last_create_time", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("account_number", "sequence", name=op.f("refunds_pkey")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "requests",
        sa.Column("account_number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("request_id", sa.String(length=128), nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(length=32), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=True),
        sa.Column("response", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("account_number", "request_id", name=op.f("requests_pkey")),
    )
    op.create_table(
        "tenants",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("slug", sa.String(length=128), nullable=False),
        sa.Column("uid", sa.String(length=36), nullable=False),
        sa.Column("display_name", sa.String(length=255), nullable=False),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.Column("demo", sa.SmallInteger(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("tenants_pkey")),
        sa.UniqueConstraint("slug", name=op.f("tenants_slug_key")),
        sa.UniqueConstraint("uid", name=op.f("tenants_uid_key")),
    )
    op.create_table(
        "token_keys",
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("key", sa.LargeBinary(length=32), nullable=False),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("token_keys_pkey")),
    )
    op.create_table(
        "transactions",
        sa.Column("account_number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("tenant_number", sa.BigInteger(), nullable=False),
        sa.Column("uid", sa.LargeBinary(length=16), nullable=False),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.Column("month", sa.Integer(), nullable=False),
        sa.Column("kind", sa.SmallInteger(), nullable=False),
        sa.Column("category", sa.String(length=63), nullable=False),
        sa.Column("state", sa.SmallInteger(), nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.Column("balance_after", sa.BigInteger(), nullable=False),
        sa.Column("location", sa.String(length=128), nullable=True),
        sa.Column("membership", sa.String(length=128), nullable=True),
        sa.Column("company", sa.String(length=128), nullable=True),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("allocations", sa.LargeBinary(), nullable=False),
        sa.Column("hash", sa.LargeBinary(length=32), nullable=False),
        sa.CheckConstraint("sequence >= 1", name=op.f("transactions_sequence_check")),
        sa.PrimaryKeyConstraint("account_number", "sequence", name=op.f("transactions_pkey")),
        sa.UniqueConstraint("account_number", "uid", name=op.f("transactions_account_number_uid_key")),
        sqlite_with_rowid=False,
    )
    op.create_index("transactions_by_amount", "transactions", ["account_number", "amount", "sequence"], unique=False)
    op.create_index(
        "transactions_by_category",
        "transactions",
        ["account_number", "kind", "category", "create_time", "sequence"],
        unique=False,
    )
    op.create_index(
        "transactions_by_month_and_amount",
        "transactions",
        ["account_number", "month", "kind", "category", "amount", "sequence"],
        unique=False,
    )
    op.create_index("transactions_by_time", "transactions", ["account_number", "create_time", "sequence"], unique=False)
    op.create_index(
        "transactions_of_company",
        "transactions",
        ["tenant_number", "company", "create_time", "account_number", "sequence"],
        unique=False,
        sqlite_where=sa.text("company IS NOT NULL"),
        postgresql_where=sa.text("company IS NOT NULL"),
    )
    op.create_index(
        "transactions_of_location",
        "transactions",
        ["tenant_number", "location", "create_time", "account_number", "sequence"],
        unique=False,
        sqlite_where=sa.text("location IS NOT NULL"),
        postgresql_where=sa.text("location IS NOT NULL"),
    )
    op.create_index(
        "transactions_of_membership",
        "transactions",
        ["tenant_number", "membership", "create_time", "account_number", "sequence"],
        unique=False,
        sqlite_where=sa.text("membership IS NOT NULL"),
        postgresql_where=sa.text("membership IS NOT NULL"),
    )
    op.create_index(
        "transactions_of_tenant",
        "transactions",
        ["tenant_number", "create_time", "account_number", "sequence"],
        unique=False,
    )
    op.create_table(
        "usage_windows",
        sa.Column("account_number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("start", sa.BigInteger(), nullable=False),
        sa.Column("computing", sa.BigInteger(), nullable=False),
        sa.Column("serverless", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("number >= 1", name=op.f("usage_windows_number_check")),
        sa.PrimaryKeyConstraint("account_number", "number", name=op.f("usage_windows_pkey")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "accounts",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("tenant_number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column(
            "id", sa.String(length=128).with_variant(sa.String(length=128, collation="C"), "postgresql"), nullable=False
        ),
        sa.Column("kind", sa.SmallInteger(), nullable=False),
        sa.Column("display_name", sa.String(length=255), nullable=False),
        sa.Column("credit_limit", sa.BigInteger(), nullable=False),
        sa.Column("hour_anchor", sa.BigInteger(), nullable=False),
        sa.Column("profile", sa.LargeBinary(), nullable=False),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.Column("update_time", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("credit_limit >= 0", name=op.f("accounts_credit_limit_check")),
        sa.ForeignKeyConstraint(["tenant_number"], ["tenants.number"], name=op.f("accounts_tenant_number_fkey")),
        sa.PrimaryKeyConstraint("number", name=op.f("accounts_pkey")),
        sa.UniqueConstraint("tenant_number", "id", name=op.f("accounts_tenant_number_id_key")),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("tenant_number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("account_number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("scopes", sa.String(length=255), nullable=False),
        sa.Column("secret_hash", sa.LargeBinary(length=32), nullable=False),
        sa.Column("create_time", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["account_number"], ["accounts.number"], name=op.f("api_keys_account_number_fkey")),
        sa.ForeignKeyConstraint(["tenant_number"], ["tenants.number"], name=op.f("api_keys_tenant_number_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("api_keys_pkey")),
    )
