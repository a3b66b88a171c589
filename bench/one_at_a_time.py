"""The `daybook` command with a poster that gives every call a database transaction of its own.

Nothing else differs, so figure 7 shows what it is worth that callers commit together.
"""

from __future__ import annotations

from server import cli
from server.posting import poster


def main() -> None:
    """Runs the command of this process's arguments."""
    assert poster.GROUP_TRANSACTIONS_MAX > 1, "the poster is bounded by this"
    poster.GROUP_TRANSACTIONS_MAX = 1
    cli.main()


if __name__ == "__main__":
    main()
