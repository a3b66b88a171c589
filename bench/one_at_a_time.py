"""The `daybook` command without group commit: every call has a database transaction of its own.

Nothing else differs, so figure 7 shows the gain of group commit.
"""

from __future__ import annotations

from server import cli
from server.posting import poster


def main() -> None:
    """Runs `daybook` with the arguments of this process."""
    assert poster.GROUP_TRANSACTIONS_MAX > 1, "the bound of the poster's groups"
    poster.GROUP_TRANSACTIONS_MAX = 1
    cli.main()


if __name__ == "__main__":
    main()
