"""`daybook import file.csv`: mappings, and a report of each bad row."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from daybook_client import AccountKind
from tests.support.importing import Importer

PLAIN = """\
account,create_time,category,amount,label.project
ada,2025-01-02T00:00:00Z,usage,-2.5,moon
ada,2025-01-01T00:00:00Z,purchase,10,
ada,2025-01-02T00:00:00Z,usage,-2.5,moon
bob,2025-01-01T00:00:00+02:00,purchase,0.000001,
"""


def saved(folder: Path, text: str, name: str = "file.csv") -> str:
    """Writes a file."""
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_columns_named_like_fields_need_no_mapping(importer: Importer, tmp_path: Path) -> None:
    """Rows are sorted by time; equal rows are different rows; a second import adds nothing."""
    file = saved(tmp_path, PLAIN)
    assert "4 transactions imported, 0 already there, 2 accounts created" in importer.imported(file)
    expected = {
        "ada": ["GRANT purchase 10", "CHARGE usage -2.5", "CHARGE usage -2.5"],
        "bob": ["GRANT purchase 0.000001"],
    }
    assert importer.state() == expected
    newest = importer.client.list_transactions("accounts/ada").page().items[0]
    assert newest.labels == {"project": "moon"}
    assert newest.create_time == datetime(2025, 1, 2, tzinfo=UTC)
    assert importer.client.get_account("accounts/ada").kind == AccountKind.OTHER
    assert "0 transactions imported, 4 already there, 0 accounts created" in importer.imported(file)
    assert importer.state() == expected


def test_mapping_reads_a_foreign_file(importer: Importer, tmp_path: Path) -> None:
    """A TOML file maps columns, values, constants and formats; flags override it."""
    file = saved(
        tmp_path,
        '\ufeffKunde;Betrag;Datum;Art;Zweck;Nummer\n"Ada-1";"1.234,50";01.07.2025 12:00;Kauf;"eins;\nzwei";R1\n'
        "Ada-1;20,5;02.01.2025 12:00;Kauf;;R0\nAda-1;7;02.07.2025 12:00;Verbrauch;;R2\n",
    )
    mapping = saved(
        tmp_path,
        """\
        [columns]
        Kunde = "account"
        Betrag = "amount"
        Datum = "create_time"
        Art = "kind"
        Zweck = "description"
        Nummer = "request_id"
        [constants]
        category = "unknown"
        [values.kind]
        Kauf = "GRANT"
        Verbrauch = "GRANT"
        [format]
        delimiter = ";"
        decimal = ","
        time = "%d.%m.%Y %H:%M"
        time_zone = "Europe/Berlin"
        """,
        "mapping.toml",
    )
    importer.imported(file, "--mapping", mapping, "--set", "category=credits", "--account-kind", "USER")
    assert importer.state() == {"Ada-1": ["GRANT credits 20.5", "GRANT credits 1234.5", "GRANT credits 7"]}
    rows = list(importer.client.list_transactions("accounts/Ada-1", order_by="create_time"))
    assert [each.request_id for each in rows] == ["R0", "R1", "R2"]
    assert rows[1].description == "eins;\nzwei"
    # Berlin is two hours ahead in summer, and one in winter.
    assert [each.create_time.hour for each in rows] == [11, 10, 10]
    assert importer.client.get_account("accounts/Ada-1").kind == AccountKind.USER


def test_consumption_is_charged(importer: Importer, tmp_path: Path) -> None:
    """A column of consumption has amounts above 0; enough credits are brought forward, and shown as such."""
    file = saved(tmp_path, "who,used,when\nada,3,2025-01-01T00:00:00Z\nada,4.5,2025-01-02T00:00:00Z\n")
    flags = (
        "--map",
        "who=account",
        "--map",
        "used=charged_amount",
        "--map",
        "when=create_time",
        "--set",
        "category=usage",
    )
    output = importer.imported(file, *flags)
    assert importer.state() == {"ada": ["GRANT opening_balance 7.5", "CHARGE usage -3", "CHARGE usage -4.5"]}
    assert "opening_balance" in output


BAD = """\
account,when,category,amount,kind
ada,2025-01-01T00:00:00Z,purchase,10,
ada,yesterday,purchase,10,
ada,2025-01-01T00:00:00Z,Purchase,10,
ada,2025-01-01T00:00:00Z,purchase,ten,
ada,2025-01-01T00:00:00Z,purchase,0.0000001,
ada,2025-01-01T00:00:00Z,purchase,-1,GRANT
ada,2025-01-01T00:00:00Z,purchase,1,LOAN
ada,2025-01-01T00:00:00Z
,2025-01-01T00:00:00Z,purchase,10,
a/b,2025-01-01T00:00:00Z,purchase,10,

ada,2999-01-01T00:00:00Z,purchase,10,
"""
PLACES = [
    "line 3, column when: create_time must be a time",
    "line 4, column category: category must be a lower-case letter",
    "line 5, column amount: amount must be a number",
    "line 6, column amount: amount must be a number with at most 6 digits",
    "line 7, column amount: ",
    "line 8, column kind: kind must be one of",
    "line 9: has 2 cells; the header has 5",
    "line 10: account is missing",
    "line 11, column account: account 'a/b' can't be the id of an account",
    "line 13, column when: create_time is in the future",
]


def test_each_bad_row_is_reported(importer: Importer, tmp_path: Path) -> None:
    """Each bad row has its line, its column and a reason. Nothing is imported, except with a flag."""
    file = saved(tmp_path, BAD)
    flags = [f"--map={name}" for name in ("account=account", "when=create_time", "category=category", "amount=amount")]
    result = importer.run(file, *flags, "--map=kind=kind")
    assert result.exit_code == 1
    title, *problems, last = result.stderr.splitlines()
    assert title == f"{len(PLACES)} rows can't be imported:"
    assert [place for place, problem in zip(PLACES, problems, strict=True) if place not in problem] == []
    assert last == "Nothing is imported: see --skip-bad-rows."
    assert importer.state() == {}
    result = importer.run(file, *flags, "--map=kind=kind", "--skip-bad-rows")
    assert result.exit_code == 0
    assert importer.state() == {"ada": ["GRANT purchase 10"]}


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("account,amount\n", (), "no column or constant is mapped to create_time, category"),
        ("account,create_time,category\n", (), "no column is mapped to amount"),
        (PLAIN, ("--map", "Konto=account"), "there is no column Konto; the columns are account, create_time"),
        (PLAIN, ("--map", "account=konto"), "there is no field 'konto'"),
        (PLAIN, ("--set", "category"), "'category' has no `=`"),
        (PLAIN + 'ada,"', (), "line 6: unexpected end of data"),
        ("", (), "no column or constant is mapped to account"),
    ],
)
def test_wrong_file_or_mapping_gets_one_line(
    importer: Importer, tmp_path: Path, content: str, flags: tuple[str, ...], message: str
) -> None:
    """A mistake in the mapping, or a file that is no such CSV file, gets one line, and nothing is imported."""
    result = importer.run(saved(tmp_path, content), *flags)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert importer.state() == {}


def test_file_of_another_encoding_is_refused(importer: Importer, tmp_path: Path) -> None:
    """A file that is not UTF-8 is refused, and an unknown table of a mapping too."""
    (tmp_path / "file.csv").write_bytes(PLAIN.replace("moon", "m\u00f6nd").encode("latin-1"))
    assert "is not UTF-8" in importer.run(str(tmp_path / "file.csv")).stderr
    mapping = saved(tmp_path, "[column]\na = 'account'\n", "mapping.toml")
    assert "unknown table column" in importer.run(saved(tmp_path, PLAIN), "--mapping", mapping).stderr
