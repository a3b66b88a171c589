"""The tables. `migrations/` creates them; a test holds the two together.

Rules that keep the schema fit for a sharded PostgreSQL: the big tables (DISTRIBUTED) carry
account_number in every primary key and unique constraint; the others (COPIED) are small enough
to be copied to every node. `tests/support/sharding_rules.py` has the rules for statements. Amounts are
millionths of a credit, instants microseconds since 1970.
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
    # What Spacebring calls the network's id.
    Column("uid", String(36), nullable=False, unique=True),
    Column("display_name", String(255), nullable=False),
    Column("create_time", BigInteger, nullable=False),
    # 1 for a tenant whose keys are printed in the documentation.
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
    Column("hour_anchor", BigInteger, nullable=False),
    # A serialized daybook.v1.Account that holds nothing but the profile.
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
    # Null for a key that is good for all of the tenant.
    Column("account_number", ForeignKey("accounts.number"), nullable=True),
    # What the key is good for: words with a space between them.
    Column("scopes", String(255), nullable=False),
    # SHA-256 of the secret; the secret itself is stored nowhere.
    Column("secret_hash", LargeBinary(32), nullable=False),
    Column("create_time", BigInteger, nullable=False),
    Column("display_name", String(255), nullable=False, server_default=""),
    # Null for a key that is good until it is revoked.
    Column("expire_time", BigInteger, nullable=True),
    Column("revoke_time", BigInteger, nullable=True),
    # Written now and then, not at every use.
    Column("last_use_time", BigInteger, nullable=True),
)
Index("api_keys_of_tenant", api_keys.c.tenant_number, api_keys.c.create_time, api_keys.c.id)

# The secrets that a rotation replaced and left good for a while.
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
    # What is owed on the credit limit.
    Column("debt", BigInteger, nullable=False),
    Column("lot_count", BigInteger, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    # The hash of the newest transaction; empty while there is none.
    Column("last_hash", LargeBinary(32), nullable=False),
    Column("last_create_time", BigInteger, nullable=False),
    # The newest row of usage_windows; 0 while there is none.
    Column("window_number", BigInteger, nullable=False),
    # When history was last imported into the account; 0 if never.
    Column("import_time", BigInteger, nullable=False),
    # How many lots are open, and the sum of those that have an expire_time. Both hold if the
    # next column is the sequence: servers older than these columns don't keep them.
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
    # The serialized daybook.v1.Transaction. A transaction never changes, so lists hand
    # these bytes out as they are.
    Column("body", LargeBinary, nullable=False),
    # A serialized daybook.internal.v1.Allocations.
    Column("allocations", LargeBinary, nullable=False),
    # SHA-256 over the predecessor's hash, body and allocations.
    Column("hash", LargeBinary(32), nullable=False),
    UniqueConstraint("account_number", "uid"),
    CheckConstraint("sequence >= 1", name="sequence"),
    # The rows of an account lie together on disk, in the order in which they are read.
    sqlite_with_rowid=False,
)

# One index for each way in which transactions are listed, every one in list order.
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
# What follows the key in these is for filters: a walk that passes over rows needs no look at them.
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
# In the order in which lots are spent; permanent ones come last within a priority.
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
# Those of one account, and those of all for the sweep.
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
    # The charge.
    Column("account_number", BigInteger, primary_key=True, autoincrement=False),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    # The sum of its refunds, and when the last of them was posted.
    Column("amount", BigInteger, nullable=False),
    Column("last_create_time", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

usage_windows = Table(
    "usage_windows",
    metadata,
    Column("account_number", BigInteger, primary_key=True, autoincrement=False),
    # 1, 2, 3 and so on, without a gap: an offset is arithmetic on it, and the largest is
    # the total.
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
    # The sequence of the transaction that is the first answer, or else the serialized answer.
    Column("sequence", BigInteger, nullable=True),
    Column("response", LargeBinary, nullable=True),
)

DISTRIBUTION_COLUMN = "account_number"
DISTRIBUTED = (account_states, transactions, lots, refunds, usage_windows, requests)
"""The big tables: on a sharded PostgreSQL all rows of an account lie together on one node."""
COPIED = (tenants, accounts, api_keys, retired_secrets, token_keys)
"""The small tables: on a sharded PostgreSQL each node has a copy. None comes before what it refers to."""
