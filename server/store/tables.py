"""The tables of the database. `migrations/` creates them; a test compares the two.

Amounts are in millionths of a credit, times in microseconds since 1970.

The schema is fit for a sharded PostgreSQL (Citus). Each distributed table (DISTRIBUTED)
has account_number in its primary key and in every unique constraint. The others (REFERENCE) are
small enough to be copied to every node. `tests/support/sharding_rules.py` has the rules for statements.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    UniqueConstraint,
    func,
    literal_column,
)

LABELS = ("location", "membership", "company")
"""The labels by which lists can be filtered; each has a column and an index."""

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
        "ck": "%(table_name)s_%(constraint_name)s_check",
    }
)

# SQLite assigns numbers by itself only to a column declared INTEGER.
_assigned_number = BigInteger().with_variant(Integer, "sqlite")
# Ordered by code point on every engine, whatever the locale of the database.
_ordered_id = String(128).with_variant(String(128, collation="C"), "postgresql")

tenants = Table(
    "tenants",
    metadata,
    Column("number", _assigned_number, primary_key=True),
    Column("slug", String(128), nullable=False, unique=True),
    # Spacebring calls it the id of the network.
    Column("uid", String(36), nullable=False, unique=True),
    Column("display_name", String(255), nullable=False),
    Column("create_time", BigInteger, nullable=False),
    # 1 for a tenant of the demo, whose keys are public.
    Column("demo", SmallInteger, nullable=False),
)

accounts = Table(
    "accounts",
    metadata,
    Column("number", _assigned_number, primary_key=True),
    Column("tenant_number", ForeignKey("tenants.number"), nullable=False),
    Column("id", _ordered_id, nullable=False),
    Column("kind", SmallInteger, nullable=False),
    Column("display_name", String(255), nullable=False),
    Column("credit_limit", BigInteger, nullable=False),
    # The time from which the hour windows of the account are counted.
    Column("hour_anchor", BigInteger, nullable=False),
    # A serialized daybook.v1.Account with only the profile.
    Column("profile", LargeBinary, nullable=False),
    Column("create_time", BigInteger, nullable=False),
    Column("update_time", BigInteger, nullable=False),
    UniqueConstraint("tenant_number", "id"),
    CheckConstraint("credit_limit >= 0", name="credit_limit"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant_number", ForeignKey("tenants.number"), nullable=False),
    # Null for a key that is valid for the whole tenant.
    Column("account_number", ForeignKey("accounts.number"), nullable=True),
    # Separated by spaces.
    Column("scopes", String(255), nullable=False),
    # SHA-256 of the secret. The secret is not stored.
    Column("secret_hash", LargeBinary(32), nullable=False),
    Column("create_time", BigInteger, nullable=False),
    Column("display_name", String(255), nullable=False, server_default=""),
    # Null for a key that does not expire.
    Column("expire_time", BigInteger, nullable=True),
    Column("revoke_time", BigInteger, nullable=True),
    # Written periodically, not at every use.
    Column("last_use_time", BigInteger, nullable=True),
)
Index("api_keys_of_tenant", api_keys.c.tenant_number, api_keys.c.create_time, api_keys.c.id)

# Secrets that a rotation has replaced. They stay valid until their expire_time.
retired_secrets = Table(
    "retired_secrets",
    metadata,
    Column("key_id", ForeignKey("api_keys.id"), primary_key=True),
    Column("secret_hash", LargeBinary(32), primary_key=True),
    Column("expire_time", BigInteger, nullable=False),
)

token_keys = Table(
    "token_keys",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("key", LargeBinary(32), nullable=False),
    Column("create_time", BigInteger, nullable=False),
)

account_states = Table(
    "account_states",
    metadata,
    Column("account_number", BigInteger, primary_key=True, autoincrement=False),
    Column("balance", BigInteger, nullable=False),
    # The amount drawn from the credit limit.
    Column("debt", BigInteger, nullable=False),
    Column("lot_count", BigInteger, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    # The hash of the newest transaction; empty while there is none.
    Column("last_hash", LargeBinary(32), nullable=False),
    Column("last_create_time", BigInteger, nullable=False),
    # The number of the newest row of usage_windows; 0 while there is none.
    Column("window_number", BigInteger, nullable=False),
    # When history was last imported into the account; 0 if never.
    Column("import_time", BigInteger, nullable=False),
    # The number of open lots, and the sum of those that have an expire_time. Both are valid only
    # if counted_sequence equals sequence: servers older than these columns do not update them.
    Column("open_lot_count", BigInteger, nullable=False, server_default="0"),
    Column("expiring", BigInteger, nullable=False, server_default="0"),
    Column("counted_sequence", BigInteger, nullable=False, server_default="0"),
    CheckConstraint("debt >= 0", name="debt"),
)

transactions = Table(
    "transactions",
    metadata,
    Column("account_number", BigInteger, primary_key=True, autoincrement=False),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("tenant_number", BigInteger, nullable=False),
    Column("uid", LargeBinary(16), nullable=False),
    Column("create_time", BigInteger, nullable=False),
    Column("month", Integer, nullable=False),
    Column("kind", SmallInteger, nullable=False),
    Column("category", String(63), nullable=False),
    Column("state", SmallInteger, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("balance_after", BigInteger, nullable=False),
    *(Column(label, String(128), nullable=True) for label in LABELS),
    # The serialized daybook.v1.Transaction. It never changes, so lists serve these bytes
    # unparsed.
    Column("body", LargeBinary, nullable=False),
    # A serialized daybook.internal.v1.Allocations.
    Column("allocations", LargeBinary, nullable=False),
    # SHA-256 over the predecessor's hash, body and allocations.
    Column("hash", LargeBinary(32), nullable=False),
    UniqueConstraint("account_number", "uid"),
    CheckConstraint("sequence >= 1", name="sequence"),
    # Clusters the rows of an account on disk, in the order in which they are read.
    sqlite_with_rowid=False,
)

# One index for each kind of list, in the order of the list.
Index("transactions_by_time", transactions.c.account_number, transactions.c.create_time, transactions.c.sequence)
Index("transactions_by_amount", transactions.c.account_number, transactions.c.amount, transactions.c.sequence)
Index(
    "transactions_by_category_and_time",
    transactions.c.account_number,
    transactions.c.kind,
    transactions.c.category,
    transactions.c.state,
    transactions.c.create_time,
    transactions.c.sequence,
)
Index(
    "transactions_by_category_and_amount",
    transactions.c.account_number,
    transactions.c.month,
    transactions.c.kind,
    transactions.c.category,
    transactions.c.state,
    transactions.c.amount,
    transactions.c.sequence,
)
# Covering columns: a filter is applied to the index alone, without fetching the rows that it rejects.
_FILTERED = (transactions.c.kind, transactions.c.category, transactions.c.state)
Index(
    "transactions_of_tenant_by_time",
    transactions.c.tenant_number,
    transactions.c.create_time,
    transactions.c.account_number,
    transactions.c.sequence,
    *_FILTERED,
)
for _label in (transactions.c[label] for label in LABELS):
    Index(
        f"transactions_of_{_label.name}_by_time",
        transactions.c.tenant_number,
        _label,
        transactions.c.create_time,
        transactions.c.account_number,
        transactions.c.sequence,
        *_FILTERED,
        sqlite_where=_label.is_not(None),
        postgresql_where=_label.is_not(None),
    )

lots = Table(
    "lots",
    metadata,
    Column("account_number", BigInteger, primary_key=True, autoincrement=False),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    # The sequence of the transaction that opened it.
    Column("opened_by", BigInteger, nullable=False),
    Column("expire_time", BigInteger, nullable=True),
    Column("priority", Integer, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("remaining", BigInteger, nullable=False),
    CheckConstraint("number >= 1", name="number"),
    CheckConstraint("remaining >= 0 AND remaining <= amount", name="remaining"),
    sqlite_with_rowid=False,
)

_is_open = lots.c.remaining > 0
# Spending order: permanent lots come last within a priority.
_expire_order = func.coalesce(lots.c.expire_time, literal_column("9223372036854775807"))
Index(
    "lots_open",
    lots.c.account_number,
    lots.c.priority,
    _expire_order,
    lots.c.number,
    sqlite_where=_is_open,
    postgresql_where=_is_open,
)
_can_expire = _is_open & lots.c.expire_time.is_not(None)
# lots_expiring serves postings, by account. lots_due serves the sweep of expirations, over all accounts.
Index(
    "lots_expiring",
    lots.c.account_number,
    lots.c.expire_time,
    lots.c.number,
    sqlite_where=_can_expire,
    postgresql_where=_can_expire,
)
Index("lots_due", lots.c.expire_time, lots.c.account_number, sqlite_where=_can_expire, postgresql_where=_can_expire)

refunds = Table(
    "refunds",
    metadata,
    # The key of the charge.
    Column("account_number", BigInteger, primary_key=True, autoincrement=False),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    # The sum of its refunds, and the create_time of the last of them.
    Column("amount", BigInteger, nullable=False),
    Column("last_create_time", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

usage_windows = Table(
    "usage_windows",
    metadata,
    Column("account_number", BigInteger, primary_key=True, autoincrement=False),
    # 1, 2, 3 and so on, without gaps, so that an offset is arithmetic and the largest number is
    # the count.
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("start", BigInteger, nullable=False),
    Column("computing", BigInteger, nullable=False),
    Column("serverless", BigInteger, nullable=False),
    CheckConstraint("number >= 1", name="number"),
    sqlite_with_rowid=False,
)

requests = Table(
    "requests",
    metadata,
    Column("account_number", BigInteger, primary_key=True, autoincrement=False),
    Column("request_id", String(128), primary_key=True),
    # SHA-256 over the method and the request without its request_id.
    Column("fingerprint", LargeBinary(32), nullable=False),
    # The answer is the transaction of this sequence, or else the serialized response.
    Column("sequence", BigInteger, nullable=True),
    Column("response", LargeBinary, nullable=True),
)

DISTRIBUTION_COLUMN = "account_number"
DISTRIBUTED = (account_states, transactions, lots, refunds, usage_windows, requests)
"""The distributed tables: a sharded PostgreSQL stores all rows of an account on one node."""
REFERENCE = (tenants, accounts, api_keys, retired_secrets, token_keys)
"""The reference tables, which are copied to each node. A table follows the tables that it references."""
