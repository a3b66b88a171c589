"""`daybook import file.csv`: mappings, and a report of each bad row."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from pathlib import Path

import pytest

from daybook_client import AccountKind
from tests.support.blocks import blocks
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
        (PLAIN, ("--map", "account=account", "--map", "Konto=konto"), "columns.Konto: there is no field 'konto'"),
        (PLAIN.replace("label.project", "amount"), (), "there are several columns amount"),
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
    """A file that is not UTF-8 is refused."""
    (tmp_path / "file.csv").write_bytes(PLAIN.replace("moon", "m\u00f6nd").encode("latin-1"))
    assert "is not UTF-8" in importer.run(str(tmp_path / "file.csv")).stderr


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ("[column]\na = 'account'", "column: Extra inputs are not permitted"),
        ("columns = 'x'", "columns: Input should be a valid dictionary"),
        ("[columns]\na = 1", "columns.a: Input should be a valid string"),
        ("[constants]\nkonto = 'x'", "constants.konto: there is no field 'konto'"),
        ("[values]\nkind = 'x'", "values.kind: Input should be a valid dictionary"),
        ("[format]\ndelimiter = ';;'", "format.delimiter: String should match"),
        ("[format]\ndecimal = ''", "format.decimal: Input should be '.' or ','"),
        ("[format]\ntime_zone = 'Mars'", "format.time_zone: "),
        ("[format]\ntime_zone = 5", "format.time_zone: "),
        ("[columns", "Expected ']'"),
    ],
)
def test_wrong_mapping_file_names_the_entry(importer: Importer, tmp_path: Path, mapping: str, message: str) -> None:
    """A mapping of another form gets one line with the file and the entry."""
    file = saved(tmp_path, mapping, "mapping.toml")
    result = importer.run(saved(tmp_path, PLAIN), "--mapping", file)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"daybook: {file}: {message}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("decimal", "text", "amount"),
    [
        (".", "1234.5", "1234.5"),
        (".", "1 234.5", "1234.5"),
        (".", "1e-05", "0.00001"),
        (".", "1,234.5", None),
        (".", "1 5", None),
        (".", "1_000", None),
        (".", "\u0663", None),
        (".", "1e999999999", None),
        (",", "1.234.567,5", "1234567.5"),
        (",", "1\u202f234", "1234"),
        (",", "0,5", "0.5"),
        (",", "1.5", None),
        (",", "1,234.5", None),
        (",", "1.2345", None),
    ],
)
def test_amount_of_another_notation_is_no_other_number(
    importer: Importer, tmp_path: Path, decimal: str, text: str, amount: str | None
) -> None:
    """Thousands are separated in groups of three digits. Any other text is a bad row, and never a wrong amount."""
    file = saved(tmp_path, f"account;create_time;category;amount\nada;2025-01-01T00:00:00Z;gift;{text}\n")
    mapping = saved(tmp_path, f"[format]\ndelimiter = ';'\ndecimal = '{decimal}'", "mapping.toml")
    result = importer.run(file, "--mapping", mapping)
    if amount is None:
        assert (
            f"line 2, column amount: amount must be a number with at most 6 digits after `{decimal}`" in result.stderr
        )
        assert importer.state() == {}
    else:
        assert importer.state() == {"ada": [f"GRANT gift {amount}"]}, result.stderr


def test_skipped_wall_time_is_a_bad_row(importer: Importer, tmp_path: Path) -> None:
    """A wall time that no clock showed is a bad row. One that clocks showed twice is the first of the two."""
    rows = "ada,2025-03-30 02:30,gift,1\nada,2025-10-26 02:30,gift,2\n"
    file = saved(tmp_path, f"account,create_time,category,amount\n{rows}")
    mapping = saved(tmp_path, '[format]\ntime = "%Y-%m-%d %H:%M"\ntime_zone = "Europe/Berlin"', "mapping.toml")
    result = importer.run(file, "--mapping", mapping, "--skip-bad-rows")
    assert "line 2, column create_time: create_time '2025-03-30 02:30' does not exist in Europe/Berlin" in result.stderr
    (imported,) = importer.client.list_transactions("accounts/ada")
    assert imported.create_time == datetime(2025, 10, 26, 0, 30, tzinfo=UTC)


def test_value_of_a_constant_may_have_an_equals_sign(importer: Importer, tmp_path: Path) -> None:
    """`--set field=value` ends the field at the first sign, and `--map column=field` the column at the last."""
    file = saved(tmp_path, "a=b,create_time,category,amount\nada,2025-01-01T00:00:00Z,gift,1\n")
    flags = [f"--map={name}={name}" for name in ("create_time", "category", "amount")]
    importer.imported(file, "--map=a=b=account", *flags, "--set=description=x=y")
    (imported,) = importer.client.list_transactions("accounts/ada")
    assert imported.description == "x=y"


def test_problem_within_a_field_names_its_column(importer: Importer, tmp_path: Path) -> None:
    """The column `owner` is the id of a user, and the refusal of this id names the column."""
    text = f"account,create_time,category,amount,owner\nada,2025-01-01T00:00:00Z,gift,1,{'x' * 200}\n"
    result = importer.run(saved(tmp_path, text))
    assert "line 2, column owner: owner.id must have at most 128 characters" in result.stderr


def test_priority_of_many_digits_is_a_bad_row(importer: Importer, tmp_path: Path) -> None:
    """A priority that no integer type holds is a bad row."""
    for priority in ("9" * 5000, "99999", "\u0663"):
        text = f"account,create_time,category,amount,priority\nada,2025-01-01T00:00:00Z,gift,1,{priority}\n"
        assert "line 2, column priority: priority must be " in importer.run(saved(tmp_path, text)).stderr


def test_another_row_with_the_same_id_is_a_bad_row(importer: Importer, tmp_path: Path) -> None:
    """A row with the request_id of a row of the same time is a duplicate only if both are equal."""
    row = "ada,2025-01-01T00:00:00Z,gift,1,r1\n"
    file = saved(tmp_path, f"account,create_time,category,amount,request_id\n{row}{row}{row.replace('1,r1', '2,r1')}")
    result = importer.run(file)
    assert result.exit_code == 1
    assert "1 rows can't be imported:\n  line 4: has the request_id r1 of another row\n" in result.stderr
    assert importer.run(file, "--skip-bad-rows").exit_code == 0
    assert importer.state() == {"ada": ["GRANT gift 1"]}


def test_documented_mappings_import_a_file(importer: Importer, tmp_path: Path) -> None:
    """The flags and the TOML file of docs/import.md map the columns that they name."""
    by_flags, by_file = (
        each for block in blocks("docs/import.md", "sh") for each in block.text.splitlines() if "history.csv" in each
    )
    (mapping,) = blocks("docs/import.md", "toml")
    english = saved(tmp_path, "Customer,Date,Credits\nada,2025-01-01T00:00:00Z,10\n", "english.csv")
    german = saved(tmp_path, "Customer;Date;Credits;Type\nbob;02.01.2025 12:00;1,5;Top-up\n", "german.csv")
    files = {"mapping.toml": saved(tmp_path, mapping.text, "mapping.toml")}
    for line, file in ((by_flags, english), (by_file, german)):
        _, _, *arguments = shlex.split(line)
        importer.imported(*({**files, "history.csv": file}.get(each, each) for each in arguments))
    assert importer.state() == {"ada": ["GRANT purchase 10"], "bob": ["GRANT purchase 1.5"]}
    newest = importer.client.list_transactions("accounts/bob").page().items[0]
    assert newest.create_time == datetime(2025, 1, 2, 11, tzinfo=UTC)
