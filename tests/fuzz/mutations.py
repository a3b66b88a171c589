"""Seeded mutations of byte strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

_INTERESTING = (
    b"",
    b"\x00",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\x00" * 8,
    b"\xff" * 9 + b"\x01",
    b"\xff" * 9 + b"\x7f",
    b"\xff\xff\xff\xff\x0f",
    b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x00",
    b"\xc0\x80",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    "\u202e".encode(),
    b"%00",
    b"%",
    b"\r\n",
    b"\n",
    b"{",
    b'"',
    b"\\u0000",
    b"\\ud800",
    b"1e999",
    b"-0",
    b"[" * 200,
)
"""Bytes that parsers often get wrong: ends of ranges, overlong varints and UTF-8, escapes and delimiters."""


def mutated(content: bytes, random: Random, mutations_max: int = 4) -> bytes:
    """Returns the content after one or more random mutations."""
    for _ in range(random.randint(1, mutations_max)):
        content = random.choice(_MUTATIONS)(content, random)
    return content


def reordered(parts: Sequence[bytes], random: Random) -> list[bytes]:
    """Returns the parts after dropping, repeating, exchanging or mutating some of them."""
    changed = list(parts)
    for _ in range(random.randint(1, 3)):
        if not changed:
            break
        at = random.randrange(len(changed))
        match random.randrange(4):
            case 0:
                del changed[at]
            case 1:
                changed[at:at] = [changed[at]] * random.choice((1, 1, 2, 50))
            case 2:
                other = random.randrange(len(changed))
                changed[at], changed[other] = changed[other], changed[at]
            case _:
                changed[at] = mutated(changed[at], random, 2)
    return changed


def _span(content: bytes, random: Random) -> tuple[int, int]:
    begin = random.randint(0, len(content))
    return begin, min(len(content), begin + random.choice((1, 1, 2, 4, 16, 64)))


def _flip(content: bytes, random: Random) -> bytes:
    if not content:
        return content
    at = random.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :]


def _replace(content: bytes, random: Random) -> bytes:
    begin, end = _span(content, random)
    return content[:begin] + random.randbytes(end - begin) + content[end:]


def _insert(content: bytes, random: Random) -> bytes:
    at = random.randint(0, len(content))
    return content[:at] + random.choice(_INTERESTING) + content[at:]


def _delete(content: bytes, random: Random) -> bytes:
    begin, end = _span(content, random)
    return content[:begin] + content[end:]


def _repeat(content: bytes, random: Random) -> bytes:
    begin, end = _span(content, random)
    return content[:end] + content[begin:end] * random.choice((1, 2, 100)) + content[end:]


def _truncate(content: bytes, random: Random) -> bytes:
    return content[: random.randint(0, len(content))]


_MUTATIONS: Sequence[Callable[[bytes, Random], bytes]] = (_flip, _flip, _replace, _insert, _delete, _repeat, _truncate)
