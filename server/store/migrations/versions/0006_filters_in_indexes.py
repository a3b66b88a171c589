"""Lists of the tenant with a filter find in an index which rows to show, and look at no other.

The indexes have new names. So an operator can build them beforehand while servers of the
version before go on (docs/operate/upgrades.md has the statements), and this takes an instant.
Else it builds them itself: in PostgreSQL nobody reads or writes transactions meanwhile, in
SQLite nobody writes.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_LABELS = ("location", "membership", "company")
_KEY = ("create_time", "account_number", "sequence", "kind", "category", "state")
_VALID = sa.text("SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE i.indisvalid")


def upgrade() -> None:
    """Goes to this revision."""
    connection = op.get_bind()
    found = {index["name"]: index["column_names"] for index in sa.inspect(connection).get_indexes("transactions")}
    # One that was given up on while it was built is there as well, but serves nobody.
    usable = set(connection.scalars(_VALID)) if connection.dialect.name == "postgresql" else set(found)
    # The lock that this takes is the strongest there is: whoever takes a weaker one first,
    # and this one later, may wait for somebody who waits for them.
    for name in ("tenant", *_LABELS):
        op.drop_index(f"transactions_of_{name}", "transactions")
    for label in (None, *_LABELS):
        name = f"transactions_of_{label or 'tenant'}_by_time"
        columns = ["tenant_number", *([label] if label else []), *_KEY]
        if name in usable and found.get(name) == columns:
            continue
        if name in found:
            op.drop_index(name, "transactions")
        present = None if label is None else sa.column(label).is_not(None)
        op.create_index(name, "transactions", columns, unique=False, sqlite_where=present, postgresql_where=present)
