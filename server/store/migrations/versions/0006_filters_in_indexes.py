"""The indexes of a tenant get the filtered columns, so that a filtered list fetches only the rows it shows.

The indexes have new names, so an operator can build them in advance while servers of the previous
version run (docs/operate/upgrades.md has the statements). The migration then takes an instant.
Otherwise it builds the indexes itself. Until it ends, PostgreSQL blocks reads and writes of the table
transactions, and SQLite blocks all writes.
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
    """Upgrades the schema to this revision."""
    connection = op.get_bind()
    found = {index["name"]: index["column_names"] for index in sa.inspect(connection).get_indexes("transactions")}
    # An index whose build was interrupted exists too, but is invalid.
    usable = set(connection.scalars(_VALID)) if connection.dialect.name == "postgresql" else set(found)
    # DROP INDEX comes first because it takes the strongest lock: taking a weaker one before it could deadlock.
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
