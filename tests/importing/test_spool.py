"""The spool sorts rows with bounded memory, and gives rows without an id one."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from daybook_client import NewTransaction, PastTransaction, TransactionKind
from server.importing import spool as module
from server.importing.found import Row
from server.importing.spool import Spool

START = datetime(2025, 1, 1, tzinfo=UTC)


def row(second: int, request_id: str = "", amount: str = "-1", account: str = "a") -> Row:
    """A charge, some seconds after the start."""
    charge = NewTransaction(TransactionKind.CHARGE, "usage", Decimal(amount))
    return Row(PastTransaction(f"accounts/{account}", charge, START + timedelta(seconds=second), request_id))


def ids(spool: Spool) -> list[str]:
    """The request_ids of a spool, in its order."""
    return [each.past.request_id for each in spool]


@pytest.mark.parametrize("run_rows", [2, 3, 7, 1000])
def test_rows_are_sorted(monkeypatch: pytest.MonkeyPatch, run_rows: int) -> None:
    """Rows come out in the order of time, with any number of temporary files, and again the second time."""
    monkeypatch.setattr(module, "RUN_ROWS", run_rows)
    seconds = [*range(50)]
    random.Random(run_rows).shuffle(seconds)
    with Spool("vendor", newest_first=True) as spool:
        for second in seconds:
            spool.add(row(second, str(second)))
        assert ids(spool) == ids(spool) == [str(second) for second in range(50)]
        folder = spool._folder
        assert len(list(folder.iterdir())) == (0 if run_rows == 1000 else -(-50 // run_rows))
    assert not folder.exists()


@pytest.mark.parametrize("newest_first", [False, True])
def test_rows_of_one_time_keep_their_order(monkeypatch: pytest.MonkeyPatch, newest_first: bool) -> None:
    """Rows of one time keep the order of the source; if that is newest first, they are reversed."""
    monkeypatch.setattr(module, "RUN_ROWS", 4)
    with Spool("vendor", newest_first=newest_first) as spool:
        for number in range(10):
            spool.add(row(0, str(number)))
        expected = [str(number) for number in range(10)]
        assert ids(spool) == (expected[::-1] if newest_first else expected)


def test_row_that_was_read_twice_counts_once() -> None:
    """A row with the same id is a duplicate, but only in its own account."""
    with Spool("vendor", newest_first=False) as spool:
        for each in (row(0, "a"), row(0, "b"), row(0, "a"), row(0, "a", account="other")):
            spool.add(each)
        assert ids(spool) == ["a", "b", "a"]


def test_equal_rows_without_ids_are_different_rows() -> None:
    """Equal rows get ids by their number, which are the same in each import, whatever else the source has."""

    def made(*rows: Row) -> list[str]:
        with Spool("csv", newest_first=False) as spool:
            for each in rows:
                spool.add(each)
            return ids(spool)

    first = made(row(0), row(0), row(1))
    assert len(set(first)) == 3
    assert set(first) < set(made(row(0), row(0, amount="-2"), row(0), row(1), row(0)))
    assert first == made(row(1), row(0), row(0))


def test_full_disk_names_the_temporary_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's folder for temporary files may have its own disk, so the error says where it is."""
    monkeypatch.setattr(module, "RUN_ROWS", 1)
    with Spool("csv", newest_first=False) as spool:
        (spool._folder / "0").symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left") as raised:
            spool.add(row(0))
        assert raised.value.filename == str(spool._folder / "0")
