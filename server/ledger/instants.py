"""Time: whole microseconds since 1970, UTC.

An instant is an int, so that it is exact, compares fast and means the same on every
engine. Local time exists only where a vendor prints it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TypeAlias
from zoneinfo import ZoneInfo

from google.protobuf.timestamp_pb2 import Timestamp

Instant: TypeAlias = int
"""Microseconds since 1970-01-01T00:00:00Z."""

Clock: TypeAlias = Callable[[], Instant]
"""Returns the present instant. Injected, so that a test or the demo can fix it."""

Stopwatch: TypeAlias = Callable[[], int]
"""Nanoseconds since an arbitrary moment, independent of changes to the system clock."""

SECOND: Instant = 1_000_000
HOUR: Instant = 3600 * SECOND
EARLIEST: Instant = -62_135_596_800 * SECOND
"""0001-01-01T00:00:00Z, the earliest Timestamp."""
LATEST: Instant = 253_402_300_800 * SECOND - 1
"""The last microsecond of the year 9999, the latest Timestamp."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DAY: Instant = 24 * HOUR
_CYCLE_YEARS = 400
"""The calendar repeats itself, days of the week included, every 400 years."""
_CYCLE: Instant = 146_097 * _DAY
_RFC_3339 = re.compile(
    r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:[Zz]|[+-](?:[01]\d|2[0-3]):[0-5]\d)", re.ASCII
)
_MONTH = re.compile(r"(\d{4})-(\d\d)", re.ASCII)


def from_datetime(moment: datetime) -> Instant:
    """The instant of an aware datetime."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def to_datetime(instant: Instant) -> datetime:
    """An instant as a datetime in UTC."""
    return _EPOCH + timedelta(microseconds=instant)


def from_timestamp(timestamp: Timestamp) -> Instant:
    """The instant of a Timestamp, truncated to microseconds."""
    return timestamp.seconds * SECOND + timestamp.nanos // 1000


def to_timestamp(instant: Instant) -> Timestamp:
    """An instant as a Timestamp."""
    timestamp = Timestamp()
    set_timestamp(timestamp, instant)
    return timestamp


def set_timestamp(timestamp: Timestamp, instant: Instant) -> None:
    """Writes an instant into a Timestamp, such as the field of a message."""
    timestamp.seconds, microseconds = divmod(instant, SECOND)
    timestamp.nanos = microseconds * 1000


def parse(text: str) -> Instant:
    """Parses RFC 3339 with any offset. Raises ValueError with a message for the caller."""
    problem = 'must be a date and time by RFC 3339, such as "2024-10-10T06:54:58Z"'
    if not _RFC_3339.fullmatch(text):
        raise ValueError(problem)
    try:
        # Converted to UTC within the try: an offset can lead outside the years 1 to 9999.
        return from_datetime(datetime.fromisoformat(text.upper()).astimezone(UTC))
    except (ValueError, OverflowError) as error:
        raise ValueError(problem) from error


def write_milliseconds(instant: Instant) -> str:
    """An instant as `2024-10-10T06:54:58.000Z`, truncated to milliseconds."""
    return to_datetime(instant).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def write(instant: Instant) -> str:
    """An instant as `2024-10-10T06:54:58.000000Z`: exact, and of one width, so that text sorts as time does."""
    return to_datetime(instant).isoformat(timespec="microseconds").replace("+00:00", "Z")


def write_wall_time(instant: Instant, zone: ZoneInfo) -> str:
    """An instant as the wall time of a zone, `2024-10-10 02:54:58`; a fraction of a second is cut off.

    Takes instants up to a day outside EARLIEST and LATEST. The year before year 1 is 0000, as
    ISO 8601 has it.
    """
    # A datetime has only the years 1 to 9999, and the zone's offset may lead outside them.
    cycles = 1 if instant < EARLIEST + _DAY else -1 if instant > LATEST - _DAY else 0
    wall = to_datetime(instant + cycles * _CYCLE).astimezone(zone)
    year = wall.year - cycles * _CYCLE_YEARS
    return f"{year:04}-{wall:%m-%d %H:%M:%S}"


def month_of(instant: Instant) -> int:
    """The month of the UTC calendar as year * 100 + month, 202410."""
    return _month_of_day(instant // (24 * HOUR))


@lru_cache(maxsize=1024)
def _month_of_day(day: int) -> int:
    moment = to_datetime(day * 24 * HOUR)
    return moment.year * 100 + moment.month


def parse_month(text: str) -> int:
    """Reads `2024-10` as 202410. Raises ValueError if there is no such month."""
    match = _MONTH.fullmatch(text)
    if match is None:
        raise ValueError("must be a month as YYYY-MM")
    year, month = int(match[1]), int(match[2])
    if year < 1 or not 1 <= month <= 12:
        raise ValueError("must be a month of the calendar")
    return year * 100 + month


def month_bounds(month: int) -> tuple[Instant, Instant]:
    """The first instant of a month (202410) and the first one after it."""
    year, number = divmod(month, 100)
    start = datetime(year, number, 1, tzinfo=UTC)
    if (year, number) == (9999, 12):
        return from_datetime(start), LATEST + 1
    end = datetime(year + number // 12, number % 12 + 1, 1, tzinfo=UTC)
    return from_datetime(start), from_datetime(end)


def window_start(anchor: Instant, instant: Instant) -> Instant:
    """The start of the hour that holds an instant, where hours start at the anchor."""
    return instant - (instant - anchor) % HOUR
