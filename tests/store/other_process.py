"""Another process that has a SQLite file open and runs SQL scripts from its input, one JSON string per line.

Run as a program, with the path of the file. It imports nothing of Daybook, so it starts quickly.
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
    """A connection without implicit transactions, which spills pages beyond two to the log immediately."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA cache_size = 2")
    return connection


class OtherProcess:
    """Sends scripts to the process."""

    def __init__(self, scripts: IO[bytes], results: IO[bytes]) -> None:
        self._scripts = scripts
        self._results = results

    def begin(self, script: str) -> None:
        """Starts a script without waiting for its end."""
        self._scripts.write(json.dumps(script).encode() + b"\n")
        self._scripts.flush()

    def end(self) -> None:
        """Waits for the end of the earliest script under way."""
        assert self._results.readline() == b"done\n"

    def do(self, script: str) -> None:
        """Runs a script and waits for its end."""
        self.begin(script)
        self.end()


@contextmanager
def other_process(path: Path) -> Iterator[OtherProcess]:
    """Starts the process, and kills it at the end of the block."""
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
