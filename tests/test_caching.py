"""The LRU cache with a bound in bytes."""

from __future__ import annotations

from server.caching import ENTRY_BYTES, ByteLRU

ENTRY = ENTRY_BYTES + 10


def cache(entries: int) -> ByteLRU[str, bytes]:
    """A cache with room for so many entries of ten bytes."""
    return ByteLRU(entries * ENTRY, lambda key, value: len(key) + len(value))


def test_the_least_recently_used_entry_is_evicted() -> None:
    """A read counts as a use."""
    kept = cache(2)
    kept.put("a", b"9 bytes a")
    kept.put("b", b"9 bytes b")
    assert kept.get("a") == b"9 bytes a"
    kept.put("c", b"9 bytes c")
    assert [kept.get(key) for key in "abc"] == [b"9 bytes a", None, b"9 bytes c"]
    assert kept.bytes == 2 * ENTRY


def test_an_entry_is_replaced() -> None:
    """One key has one entry, of the size of its last value."""
    kept = cache(2)
    for _ in range(1000):
        kept.put("a", b"")
        kept.put("a", b"9 bytes a")
    assert (kept.get("a"), kept.bytes) == (b"9 bytes a", ENTRY)


def test_an_entry_beyond_the_bound_is_not_kept() -> None:
    """Nor is the entry that it would replace, and no other entry is evicted for it."""
    kept = cache(2)
    kept.put("a", b"9 bytes a")
    kept.put("b", b"9 bytes b")
    kept.put("a", bytes(2 * ENTRY))
    assert [kept.get(key) for key in "ab"] == [None, b"9 bytes b"]
    assert kept.bytes == ENTRY


def test_the_size_never_exceeds_the_bound() -> None:
    """Whatever is put."""
    kept = cache(8)
    for number in range(2000):
        kept.put(f"{number % 37}", bytes(number * 7919 % 900))
        assert kept.bytes <= 8 * ENTRY
