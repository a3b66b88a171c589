"""Processes beside the server that work imports out before they are posted.

To read and check history and to apply the rules to it takes longer than to write it, and one
interpreter does one thing at a time. So a long import has these processes do the first while
the server does the second: see server/usecases/preparing.py for what makes that safe. Each
is asked on its standard input and answers in order on its standard output; it ends when
that input does, so not even a kill -9 of the server leaves it behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import pickle
import sys
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from struct import Struct
from typing import Any, BinaryIO, NamedTuple
from zlib import crc32

import structlog
from daybook.v1.admin_service_pb2 import ImportTransactionsRequest

from server.ledger.names import RandomBytes, in_blocks, spread
from server.rpc.history import read_item
from server.store.unit import Known, Prepared
from server.usecases.preparing import Preparer

log = structlog.get_logger(__name__)

PROCESSES = 2
"""How many there are: one alone takes longer over a row than the database does."""
IDLE_SECONDS_MAX = 60.0
"""How long they are kept without an import."""
BUFFER_BYTES = 1024 * 1024
SEED_BYTES = 32
_HEAD = Struct(">QI")
"""What stands before each thing on its way: its length and its CRC-32. What is written to the ledger came over it."""
PROGRAM = (sys.executable, "-P", "-m", "server.rpc.preparing")


class _NotWhole(Exception):
    """Something came otherwise than it was sent."""


class _Task(NamedTuple):
    """What the process is asked."""

    message: bytes
    """A serialized ImportTransactionsRequest."""
    known: Known
    """What it needs to know beside what it knows: of its accounts only."""
    is_first: bool
    """Whether it is to forget all that it knows before."""
    seed: bytes
    """What its randomness is made of, which is the server's."""


class PreparingProcesses:
    """The processes, as the server sees them: started when they are first wanted. One import at a time has them.

    The accounts are dealt out among them, for no account's history depends on another's.
    """

    def __init__(self, random_bytes: RandomBytes) -> None:
        self._processes = [_PreparingProcess(random_bytes) for _ in range(PROCESSES)]
        self._account_count = 0
        self._is_taken = False
        self._idle: asyncio.TimerHandle | None = None

    @property
    def are_ready(self) -> bool:
        """Whether all have started and none has ended."""
        return all(process.is_ready for process in self._processes)

    def take(self) -> bool:
        """Whether the caller has them from now on; others have to do without until they are given back."""
        if self._is_taken:
            return False
        self._is_taken = True
        self._forget_idle()
        for process in self._processes:
            process.start()
        return True

    def give_back(self) -> None:
        """Lets others take them."""
        self._is_taken = False
        self._idle = asyncio.get_running_loop().call_later(IDLE_SECONDS_MAX, self._end)

    def prepare(self, message: bytes, known: Known, *, is_first: bool) -> asyncio.Future[list[Prepared | None]]:
        """Works a message out, after all those of before. Each gives what is of its accounts, or None if it can't."""
        shares = [Known({}, {}) for _ in self._processes]
        share_of: dict[int, Known] = {}
        for number, stored in known.states.items():
            share_of[number] = share = shares[self._account_count % len(shares)]
            share.states[number] = stored
            self._account_count += 1
        for key, opener in known.openers.items():
            share_of[key[0]].openers[key] = opener
        return asyncio.gather(
            *(
                process.prepare(message, share, is_first=is_first)
                for process, share in zip(self._processes, shares, strict=True)
            )
        )

    async def close(self) -> None:
        """Ends the processes."""
        self._forget_idle()
        await asyncio.gather(*(process.close() for process in self._processes))

    def _end(self) -> None:
        for process in self._processes:
            process.end()

    def _forget_idle(self) -> None:
        if self._idle is not None:
            self._idle.cancel()


class _PreparingProcess:
    """One of the processes."""

    def __init__(self, random_bytes: RandomBytes) -> None:
        self._random_bytes = random_bytes
        self._running: asyncio.Task[None] | None = None
        self._input: asyncio.StreamWriter | None = None
        self._waiting: deque[asyncio.Future[Prepared | None]] = deque()

    @property
    def is_ready(self) -> bool:
        """Whether it has started and not ended."""
        return self._input is not None

    def start(self) -> None:
        """Starts it unless it runs."""
        if self._running is None:
            self._running = asyncio.create_task(self._run())

    def prepare(self, message: bytes, known: Known, *, is_first: bool) -> asyncio.Future[Prepared | None]:
        """Works out what is of its accounts. Gives None where that can't be done, or without a process."""
        answer: asyncio.Future[Prepared | None] = asyncio.get_running_loop().create_future()
        if self._input is None:
            answer.set_result(None)
        else:
            self._waiting.append(answer)
            # Whoever asks has a few messages under way at most, so nothing piles up here.
            _write(self._input, _Task(message, known, is_first, self._random_bytes(SEED_BYTES)))
        return answer

    async def close(self) -> None:
        """Ends it, and waits until it has ended."""
        self.end()
        if self._running is not None:
            await asyncio.wait([self._running])

    def end(self) -> None:
        """Ends it."""
        if self._running is not None:
            self._running.cancel()

    async def _run(self) -> None:
        """Starts the process and takes its answers, until it ends or this is cancelled."""
        process = None
        try:
            process = await asyncio.create_subprocess_exec(
                *PROGRAM,
                stdin=PIPE,
                stdout=PIPE,
                limit=BUFFER_BYTES,
                # Ctrl-C must reach only this process, which ends that one when its calls have ended.
                start_new_session=True,
            )
            await self._take_answers(process)
        except (OSError, asyncio.IncompleteReadError, _NotWhole) as error:
            log.warning("process that prepares imports ended", error=type(error).__name__)
        finally:
            self._running = self._input = None
            while self._waiting:
                _answer(self._waiting.popleft(), None)
            if process is not None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()

    async def _take_answers(self, process: Process) -> None:
        assert process.stdout is not None
        while True:
            length, checksum = _HEAD.unpack(await process.stdout.readexactly(_HEAD.size))
            answer: Prepared | None = _unpickle(await process.stdout.readexactly(length), checksum)
            if self._input is None:
                # The first thing that it says is that it has started.
                self._input = process.stdin
                log.info("preparing imports", pid=process.pid)
            else:
                _answer(self._waiting.popleft(), answer)


def _answer(waiting: asyncio.Future[Prepared | None], answer: Prepared | None) -> None:
    """Answers whoever waits, unless they have gone away."""
    if not waiting.done():
        waiting.set_result(answer)


@asynccontextmanager
async def preparing_processes(random_bytes: RandomBytes) -> AsyncIterator[PreparingProcesses]:
    """Processes for imports, which end with the block."""
    processes = PreparingProcesses(random_bytes)
    try:
        yield processes
    finally:
        await processes.close()


def _write(stream: asyncio.StreamWriter | BinaryIO, thing: _Task | Prepared | None) -> None:
    pickled = pickle.dumps(thing, pickle.HIGHEST_PROTOCOL)
    stream.write(_HEAD.pack(len(pickled), crc32(pickled)))
    stream.write(pickled)


def _unpickle(pickled: bytes, checksum: int) -> Any:
    if crc32(pickled) != checksum:
        raise _NotWhole
    return pickle.loads(pickled)  # noqa: S301  # our own


def main() -> None:
    """The work of the process: answers every message, until there are no more."""
    # What it makes hangs together in no circles.
    gc.disable()
    preparer = Preparer()
    answers = sys.stdout.buffer
    # That it has started.
    _write(answers, None)
    answers.flush()
    # A server that was killed reads no answers any more, and may have broken off in the middle.
    with contextlib.suppress(BrokenPipeError, _NotWhole):
        while len(head := sys.stdin.buffer.read(_HEAD.size)) == _HEAD.size:
            length, checksum = _HEAD.unpack(head)
            task: _Task = _unpickle(sys.stdin.buffer.read(length), checksum)
            _write(answers, _prepare(preparer, task))
            answers.flush()


def _prepare(preparer: Preparer, task: _Task) -> Prepared | None:
    if task.is_first:
        preparer.forget()
    preparer.learn(task.known)
    try:
        items = ImportTransactionsRequest.FromString(task.message).items
        history = (read_item(item) for item in items if item.parent in preparer.names)
        return preparer.prepare(history, in_blocks(spread(task.seed)))
    except Exception:
        # Whatever it is, the server finds out when it does the same, and knows whom to tell.
        return None


if __name__ == "__main__":
    main()
