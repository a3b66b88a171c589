"""Whether anything was committed to SQLite's file, found without asking SQLite.

A fast path. All processes that have a file open share an index of its write-ahead log, in
memory. It begins with two copies of a header that is another one after each commit (a
counter, how long the log is, a checksum of all that is in it), and by that header SQLite
itself finds, at the begin of every read, whether what it knows of the file still holds
(https://sqlite.org/walformat.html). It takes a lock to do so, and gives it back, and a
statement around that costs a tenth of a list.

An index that is new, or was made anew behind a process that was killed, tells nothing of what
its predecessor had. So a header stands for something only while this process has the file
open, and only as long as it is the one that was seen last.
"""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from pathlib import Path

HEADER_BYTES = 96
"""Both copies. While a commit is being told they differ, and so from what they were before and will be."""
VERSION = struct.pack("=I", 3_007_000)
"""What a header begins with. Of another one it isn't known what it stands for."""

MAPS = Path("/proc/self/maps")
"""What is where in this process's memory, as Linux tells it."""
MEMORY = Path("/proc/self/mem")


class WalIndex:
    """The index of the log of one file, as SQLite has it in this process's memory.

    It isn't read from its own file: to close that one again, by whoever in this process, takes
    away the locks that SQLite has on it. It is read through /proc/self/mem: where nothing is
    mapped any more, that gives an error, and a pointer would crash.
    """

    def __init__(self, memory: int, address: int) -> None:
        """Prefer `find`. `memory` is a descriptor of this process's memory."""
        self._memory = memory
        self._address = address

    @classmethod
    def find(cls, database: str) -> WalIndex | None:
        """That of a file of which a connection of this process has read; None where it can't be read.

        So it is for databases without a file, and on systems that don't show processes as Linux does.
        """
        with suppress(OSError):
            address = _address(f"{database}-shm")
            if address is not None:
                index = cls(os.open(MEMORY, os.O_RDONLY | os.O_CLOEXEC), address)
                if index.mark() is not None:
                    return index
                index.close()
        return None

    def mark(self) -> bytes | None:
        """Stands for what is committed at this moment: where it is the same as when last asked for, nothing was since.

        None where there is no such header any more.
        """
        try:
            header = os.pread(self._memory, HEADER_BYTES, self._address)
        except OSError:
            return None
        return header if header.startswith(VERSION) else None

    def close(self) -> None:
        """Ends it. To be done before SQLite lets the file go, for then anything may be in its place."""
        os.close(self._memory)


def _address(path: str) -> int | None:
    """Where in this process's memory a file begins; None if it isn't there. Raises OSError."""
    for line in MAPS.read_bytes().splitlines():
        # Addresses, rights, offset in the file, device, number of the file, path.
        fields = line.split(maxsplit=5)
        if fields[5:] == [os.fsencode(path)] and int(fields[2], 16) == 0:
            return int(fields[0].partition(b"-")[0], 16)
    return None
