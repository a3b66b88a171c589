"""Instants: parsing and formatting RFC 3339, months of the UTC calendar, and hours from an anchor."""

from __future__ import annotations

import calendar
from contextlib import suppress
from datetime import UTC, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from server.ledger import instants
from server.ledger.instants import HOUR, SECOND

YEAR_1 = -62_135_596_800 * SECOND
"""0001-01-01T00:00:00Z, the earliest Timestamp."""
YEAR_9999_END = 253_402_300_800 * SECOND - 1
"""9999-12-31T23:59:59.999999Z, the latest."""

NEW_YORK = ZoneInfo("America/New_York")

# Hypothesis draws integers mostly near 0 (1970), but datetimes of all years.
INSTANTS = st.integers(YEAR_1, YEAR_9999_END) | st.datetimes(timezones=st.just(UTC)).map(instants.from_datetime)
MONTHS = st.builds(lambda year, month: year * 100 + month, st.integers(1, 9999), st.integers(1, 12))

# 1728543298 is 2024-10-10T06:54:58Z: 20006 days after 1970-01-01, and 24898 seconds.
MORNING = (20_006 * 86_400 + 24_898) * SECOND


@pytest.mark.parametrize(
    ("text", "instant"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("2024-10-10T06:54:58Z", MORNING),
        ("2024-10-10t06:54:58z", MORNING),
        ("2024-10-10T06:54:58z", MORNING),
        ("2024-10-10t06:54:58+00:00", MORNING),
        ("2024-10-10T06:54:58-00:00", MORNING),
        ("2024-10-10T08:54:58+02:00", MORNING),
        ("2024-10-10T12:24:58+05:30", MORNING),
        ("2024-10-09T22:54:58-08:00", MORNING),
        ("2024-10-11T06:53:58+23:59", MORNING),
        ("2024-10-09T06:55:58-23:59", MORNING),
        ("2024-10-10T06:54:58.1Z", MORNING + 100_000),
        ("2024-10-10T06:54:58.12Z", MORNING + 120_000),
        ("2024-10-10T06:54:58.123Z", MORNING + 123_000),
        ("2024-10-10T06:54:58.1234Z", MORNING + 123_400),
        ("2024-10-10T06:54:58.12345Z", MORNING + 123_450),
        ("2024-10-10T06:54:58.123456Z", MORNING + 123_456),
        ("2024-10-10T06:54:58.1234567Z", MORNING + 123_456),
        ("2024-10-10T06:54:58.12345678Z", MORNING + 123_456),
        ("2024-10-10T06:54:58.123456789Z", MORNING + 123_456),
        ("2024-10-10T06:54:58.999999999Z", MORNING + 999_999),
        ("2024-10-10T06:54:58.000000Z", MORNING),
        ("2024-10-10T08:54:58.5+02:00", MORNING + 500_000),
        ("1969-12-31T23:59:59Z", -SECOND),
        ("1969-12-31T23:59:59.999999999Z", -1),
        ("2024-02-29T00:00:00Z", 19_782 * 86_400 * SECOND),
        ("2000-02-29T00:00:00Z", 11_016 * 86_400 * SECOND),
        ("0001-01-01T00:00:00Z", YEAR_1),
        ("9999-12-31T23:59:59.999999Z", YEAR_9999_END),
    ],
)
def test_rfc_3339_is_parsed(text: str, instant: int) -> None:
    """A date and time by RFC 3339 is parsed exactly, truncated to microseconds."""
    assert instants.parse(text) == instant


@pytest.mark.parametrize(
    "text",
    [
        "",
        "now",
        "1728543298",
        "2024-10-10",
        "2024-10-10T06:54:58",
        "2024-10-10T06:54Z",
        "2024-10-10T06Z",
        "2024-10-10 06:54:58Z",
        "2024-10-10_06:54:58Z",
        "20241010T065458Z",
        "2024-W41-4T06:54:58Z",
        "2024-10-10T06:54:58,5Z",
        "2024-10-10T06:54:58.Z",
        "2024-10-10T06:54:58.1234567890Z",
        "2024-10-10T06:54:58ZZ",
        "2024-10-10T06:54:58+02",
        "2024-10-10T06:54:58+0200",
        "2024-10-10T06:54:58 02:00",
        "2024-10-10T06:54:58+02:00:00",
        "2024-10-10T06:54:58+24:00",
        "2024-10-10T06:54:58-24:00",
        "2024-10-10T06:54:58+00:60",
        "2024-10-10T06:54:58-05:75",
        "2024-10-10T06:54:58+99:99",
        "2024-10-10T24:00:00Z",
        "2024-10-10T25:00:00Z",
        "2024-10-10T06:60:00Z",
        "2016-12-31T23:59:60Z",
        "2024-10-10T06:54:61Z",
        "2023-02-29T00:00:00Z",
        "1900-02-29T00:00:00Z",
        "2024-02-30T00:00:00Z",
        "2024-04-31T00:00:00Z",
        "2024-13-01T00:00:00Z",
        "2024-00-01T00:00:00Z",
        "2024-01-00T00:00:00Z",
        "0000-01-01T00:00:00Z",
        "10000-01-01T00:00:00Z",
        "-001-01-01T00:00:00Z",
        "24-10-10T06:54:58Z",
        "2024-1-1T06:54:58Z",
        " 2024-10-10T06:54:58Z",
        "2024-10-10T06:54:58Z ",
        "2024-10-10T06:54:58Z\n",
        "٢٠٢٤-10-10T06:54:58Z",
        "2024-10-10T06:54:58\u2212 02:00",
    ],
)
def test_other_times_are_refused(text: str) -> None:
    """A text that is not a date and time by RFC 3339 is refused with a message for the caller."""
    with pytest.raises(ValueError, match="must be a date and time by RFC 3339"):
        instants.parse(text)


@given(st.text())
def test_any_text_is_parsed_or_refused(text: str) -> None:
    """Any text is either parsed or refused with a ValueError."""
    with suppress(ValueError):
        assert isinstance(instants.parse(text), int)


@given(
    INSTANTS.filter(lambda instant: YEAR_1 + 24 * HOUR < instant < YEAR_9999_END - 24 * HOUR),
    st.integers(-(23 * 60 + 59), 23 * 60 + 59),
)
def test_an_offset_does_not_change_the_instant(instant: int, offset_minutes: int) -> None:
    """An instant formatted with any offset is parsed as that instant."""
    zone = timezone(timedelta(minutes=offset_minutes))
    assert instants.parse(instants.to_datetime(instant).astimezone(zone).isoformat()) == instant


@pytest.mark.parametrize(
    ("instant", "text"),
    [
        (0, "1970-01-01T00:00:00.000000Z"),
        (MORNING, "2024-10-10T06:54:58.000000Z"),
        (MORNING + 1, "2024-10-10T06:54:58.000001Z"),
        (MORNING + 120_000, "2024-10-10T06:54:58.120000Z"),
        (-1, "1969-12-31T23:59:59.999999Z"),
        (YEAR_1, "0001-01-01T00:00:00.000000Z"),
        (YEAR_9999_END, "9999-12-31T23:59:59.999999Z"),
    ],
)
def test_an_instant_is_written_as_rfc_3339(instant: int, text: str) -> None:
    """An instant is written in UTC with six fractional digits."""
    assert instants.write(instant) == text


@pytest.mark.parametrize(
    ("instant", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (MORNING, "2024-10-10T06:54:58.000Z"),
        (MORNING + 999, "2024-10-10T06:54:58.000Z"),
        (MORNING + 1000, "2024-10-10T06:54:58.001Z"),
        (MORNING + 999_999, "2024-10-10T06:54:58.999Z"),
        (-1, "1969-12-31T23:59:59.999Z"),
        (-999_001, "1969-12-31T23:59:59.000Z"),
        (YEAR_9999_END, "9999-12-31T23:59:59.999Z"),
        (YEAR_1, "0001-01-01T00:00:00.000Z"),
    ],
)
def test_an_instant_is_written_with_milliseconds(instant: int, text: str) -> None:
    """An instant is written with three fractional digits, truncated."""
    assert instants.write_milliseconds(instant) == text


@given(INSTANTS)
def test_a_written_instant_is_parsed_back(instant: int) -> None:
    """Every instant of the calendar is parsed back exactly."""
    assert instants.parse(instants.write(instant)) == instant


@given(INSTANTS, INSTANTS)
def test_text_sorts_as_time_does(one: int, other: int) -> None:
    """Texts of instants sort as the instants do."""
    assert (instants.write(one) < instants.write(other)) == (one < other)


@pytest.mark.parametrize(
    ("instant", "text"),
    [
        (MORNING, "2024-10-10 02:54:58"),
        (MORNING + 999_999, "2024-10-10 02:54:58"),
        # 2024-11-03 has the hour from 01:00 twice, at the end of daylight saving time.
        ((20_030 * 24 + 5) * HOUR, "2024-11-03 01:00:00"),
        ((20_030 * 24 + 6) * HOUR, "2024-11-03 01:00:00"),
        (YEAR_1 + 5 * HOUR, "0001-01-01 00:03:58"),
        (YEAR_1, "0000-12-31 19:03:58"),
        (YEAR_1 - 1, "0000-12-31 19:03:57"),
        (YEAR_1 - HOUR, "0000-12-31 18:03:58"),
        (YEAR_9999_END, "9999-12-31 18:59:59"),
        (YEAR_9999_END + HOUR, "9999-12-31 19:59:59"),
    ],
)
def test_an_instant_is_written_as_wall_time(instant: int, text: str) -> None:
    """An instant is written as the wall time of a zone, even if that lies outside the years 1 to 9999."""
    assert instants.write_wall_time(instant, NEW_YORK) == text


def test_wall_time_east_of_the_calendar() -> None:
    """In a zone ahead of UTC, the last instants of the calendar are in the year 10000."""
    assert instants.write_wall_time(YEAR_9999_END, ZoneInfo("Asia/Tokyo")) == "10000-01-01 08:59:59"


@given(INSTANTS.filter(lambda instant: YEAR_1 + 24 * HOUR <= instant <= YEAR_9999_END - 24 * HOUR))
def test_wall_time_agrees_with_the_library(instant: int) -> None:
    """Inside the calendar, the wall time equals that of zoneinfo."""
    wall = instants.to_datetime(instant).astimezone(NEW_YORK).replace(tzinfo=None)
    assert instants.write_wall_time(instant, NEW_YORK) == wall.isoformat(sep=" ", timespec="seconds")


@given(INSTANTS)
def test_written_milliseconds_are_parsed_back(instant: int) -> None:
    """Every instant written with milliseconds is parsed back, truncated to milliseconds."""
    assert instants.parse(instants.write_milliseconds(instant)) == instant - instant % 1000


@given(INSTANTS)
def test_timestamps_and_datetimes_are_exact(instant: int) -> None:
    """Conversions to a Timestamp and to a datetime are exact, and the Timestamp is valid."""
    timestamp = instants.to_timestamp(instant)
    assert 0 <= timestamp.nanos < 1_000_000_000
    assert instants.from_timestamp(timestamp) == instant
    assert instants.from_datetime(instants.to_datetime(instant)) == instant


@pytest.mark.parametrize(
    ("seconds", "nanoseconds", "instant"),
    [
        (0, 0, 0),
        (1, 999, SECOND),
        (1, 1000, SECOND + 1),
        (0, 999_999_999, 999_999),
        (-1, 999_999_999, -1),
        (-1, 0, -SECOND),
    ],
)
def test_timestamps_are_truncated_to_microseconds(seconds: int, nanoseconds: int, instant: int) -> None:
    """A Timestamp is truncated to microseconds, toward the past."""
    assert instants.from_timestamp(Timestamp(seconds=seconds, nanos=nanoseconds)) == instant


@pytest.mark.parametrize(
    ("text", "month"),
    [
        ("1970-01-01T00:00:00Z", 197001),
        ("1969-12-31T23:59:59.999999Z", 196912),
        ("2024-10-31T23:59:59.999999Z", 202410),
        ("2024-11-01T00:00:00Z", 202411),
        ("2024-11-01T00:30:00+01:00", 202410),
        ("2024-10-31T23:30:00-01:00", 202411),
        ("2024-12-31T23:59:59Z", 202412),
        ("9999-12-31T23:59:59Z", 999912),
        ("0001-01-01T00:00:00Z", 101),
    ],
)
def test_the_month_of_an_instant_is_its_utc_month(text: str, month: int) -> None:
    """The month of an instant is the month of its date in UTC."""
    assert instants.month_of(instants.parse(text)) == month


@pytest.mark.parametrize(
    ("text", "month"),
    [("2024-10", 202410), ("2024-01", 202401), ("2024-12", 202412), ("0001-01", 101), ("9999-12", 999912)],
)
def test_a_month_is_parsed(text: str, month: int) -> None:
    """A month of the calendar is parsed as year * 100 + month."""
    assert instants.parse_month(text) == month


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2024",
        "2024-1",
        "2024-13",
        "2024-00",
        "2024-99",
        "0000-01",
        "0000-12",
        "02024-10",
        "24-10",
        "202410",
        "2024/10",
        "2024-10-01",
        "2024-10 ",
        " 2024-10",
        "2024-10\n",
        "-024-10",
        "٢٠٢٤-10",
        "2024-\uff11\uff10",
    ],
)
def test_other_months_are_refused(text: str) -> None:
    """A text that is not a month of the calendar is refused."""
    with pytest.raises(ValueError, match="must be a month"):
        instants.parse_month(text)


@given(MONTHS)
def test_every_month_is_parsed(month: int) -> None:
    """Every month of the years 1 to 9999 is parsed."""
    assert instants.parse_month(f"{month // 100:04d}-{month % 100:02d}") == month


@given(MONTHS)
def test_month_bounds_enclose_exactly_the_month(month: int) -> None:
    """The first and the last instant within the bounds are in the month, and the bounds span its number of days."""
    start, end = instants.month_bounds(month)
    assert instants.month_of(start) == month
    assert instants.month_of(end - 1) == month
    assert end - start == calendar.monthrange(month // 100, month % 100)[1] * 24 * HOUR


@given(INSTANTS)
def test_every_instant_is_inside_the_bounds_of_its_month(instant: int) -> None:
    """The bounds of an instant's month enclose the instant."""
    start, end = instants.month_bounds(instants.month_of(instant))
    assert start <= instant < end


@given(MONTHS.filter(lambda month: month != 999912))
def test_months_are_contiguous(month: int) -> None:
    """A month ends where the next one begins."""
    following = month + 1 if month % 100 < 12 else (month // 100 + 1) * 100 + 1
    assert instants.month_bounds(month)[1] == instants.month_bounds(following)[0]


def test_the_last_month_ends_with_the_calendar() -> None:
    """The bounds of December 9999 end one microsecond after the last instant of the calendar."""
    start, end = instants.month_bounds(999912)
    assert instants.write(start) == "9999-12-01T00:00:00.000000Z"
    assert end == YEAR_9999_END + 1


@pytest.mark.parametrize(
    ("anchor", "instant", "start"),
    [
        (0, 0, 0),
        (0, HOUR - 1, 0),
        (0, HOUR, HOUR),
        (0, -1, -HOUR),
        (0, -HOUR, -HOUR),
        (5, 4, 5 - HOUR),
        (5, 5, 5),
        (3 * HOUR + 5, 4, 5 - HOUR),
        (3 * HOUR + 5, 5, 5),
        (-7, HOUR - 8, -7),
        (-7, HOUR - 7, HOUR - 7),
    ],
)
def test_hours_start_at_the_anchor(anchor: int, instant: int, start: int) -> None:
    """The hour of an instant starts at the anchor plus or minus whole hours, at or before the instant."""
    assert instants.window_start(anchor, instant) == start


@given(INSTANTS, INSTANTS)
def test_every_instant_is_in_its_hour(anchor: int, instant: int) -> None:
    """The hour of an instant contains it and starts a whole number of hours from the anchor."""
    start = instants.window_start(anchor, instant)
    assert start <= instant < start + HOUR
    assert (start - anchor) % HOUR == 0
