"""The LRU cache, whose size is limited in bytes."""

from __future__ import annotations

from server.caching import ENTRY_BYTES, ByteLRU

ENTRY = ENTRY_BYTES + 10


def cache(entries: int) -> ByteLRU[str, bytes]:
    """Returns a cache with room for `entries` entries of ten bytes."""
    return ByteLRU(entries * ENTRY, lambda key, value: len(key) + len(value))


def test_least_recently_used_entry_is_evicted() -> None:
    """A full cache evicts the entry that was written or read least recently."""
    kept = cache(2)
    kept.put("a", b"9 bytes a")
    kept.put("b", b"9 bytes b")
    assert kept.get("a") == b"9 bytes a"
    kept.put("c", b"9 bytes c")
    assert [kept.get(key) for key in "abc"] == [b"9 bytes a", None, b"9 bytes c"]
    assert kept.bytes == 2 * ENTRY


def test_entry_is_replaced() -> None:
    """Writing a key again replaces its entry, and the size is that of the new value."""
    kept = cache(2)
    for _ in range(1000):
        kept.put("a", b"")
        kept.put("a", b"9 bytes a")
    assert (kept.get("a"), kept.bytes) == (b"9 bytes a", ENTRY)


def test_entry_larger_than_the_limit_is_not_cached() -> None:
    """An entry larger than the cache is not stored. Its previous entry is removed; other entries stay."""
    kept = cache(2)
    kept.put("a", b"9 bytes a")
    kept.put("b", b"9 bytes b")
    kept.put("a", bytes(2 * ENTRY))
    assert [kept.get(key) for key in "ab"] == [None, b"9 bytes b"]
    assert kept.bytes == ENTRY


def test_size_never_exceeds_the_limit() -> None:
    """The size stays within the limit for values of any size."""
    kept = cache(8)
    for number in range(2000):
        kept.put(f"{number % 37}", bytes(number * 7919 % 900))
        assert kept.bytes <= 8 * ENTRY
