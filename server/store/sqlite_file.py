"""Whether SQLite's file can be used, checked before it is opened: the driver's own words name no cause."""

from __future__ import annotations

import os
from pathlib import Path

from sqlalchemy.engine import URL


def problem_of(url: URL) -> str | None:
    """Why no ledger can be kept in the file of this URL, in words that follow the setting's name; None if it can.

    Makes the file's folder if it is missing. Does not open the file: to close it would release
    the locks that SQLite has on it in this process. Raises OSError if the folder can't be made.
    """
    if url.query:
        return "takes no parameters after a ? for SQLite"
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        return "must name a file, like sqlite+aiosqlite:///daybook.db: what is kept in memory is lost with the process"
    file = Path(url.database)
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        return None if os.access(file.parent, os.W_OK | os.X_OK) else "names a folder that this user can't write to"
    if not file.is_file():
        return "names a folder or a device; it must name a file"
    if not os.access(file, os.R_OK | os.W_OK):
        return "names a file that this user can't read and write"
    if not os.access(file.parent, os.W_OK | os.X_OK):
        return "names a file in a folder that this user can't write to, where SQLite keeps its log"
    return None
