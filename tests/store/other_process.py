"""Another process that has a file of SQLite's open, and does what it is told: one script a line, as JSON.

Run as a program, with the path of the file. It knows nothing of Daybook, and so starts soon.
"""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO


def connect(path: Path) -> sqlite3.Connection:
    """A connection that begins no transaction by itself, and writes what is more than two pages to the log at once."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA cache_size = 2")
    return connection


class OtherProcess:
    """Tells it."""

    def __init__(self, told: IO[bytes], done: IO[bytes]) -> None:
        self._told = told
        self._done = done

    def begin(self, script: str) -> None:
        """Has it done meanwhile."""
        self._told.write(json.dumps(script).encode() + b"\n")
        self._told.flush()

    def end(self) -> None:
        """Waits until what was begun first is done."""
        assert self._done.readline() == b"done\n"

    def do(self, script: str) -> None:
        """Has it done, and waits for it."""
        self.begin(script)
        self.end()


@contextmanager
def other_process(path: Path) -> Iterator[OtherProcess]:
    """It is killed at the end."""
    process = subprocess.Popen([sys.executable, __file__, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        try:
            yield OtherProcess(process.stdin, process.stdout)
        finally:
            process.kill()


if __name__ == "__main__":
    with closing(connect(Path(sys.argv[1]))) as opened:
        for line in sys.stdin:
            opened.executescript(json.loads(line))
            sys.stdout.write("done\n")
            sys.stdout.flush()
