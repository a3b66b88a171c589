"""The `daybook` command without group commit: every call has its own database transaction.

Nothing else differs, so figure 7 measures the gain of group commit.
"""

from __future__ import annotations

from server import cli
from server.posting import poster


def main() -> None:
    """Runs the `daybook` command."""
    assert poster.GROUP_TRANSACTIONS_MAX > 1, "the limit of the poster's groups"
    poster.GROUP_TRANSACTIONS_MAX = 1
    cli.main()


if __name__ == "__main__":
    main()
