"""The environment of alembic. Runs migrations on the connection that server/store/migrate.py passes."""

from __future__ import annotations

from alembic import context

from server.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
# The caller began the transaction and commits it.
context.run_migrations()
