"""`daybook export`: its files equal the server's, and an interrupted export is continued without a gap."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pyarrow.parquet
import pytest
from daybook.v1.ledger_service_pb2 import ExportTransactionsRequest, ExportTransactionsResponse

from daybook_client import AccountKind, Daybook, NewTransaction, PastTransaction, Posting, TransactionKind
from server.cli.export_files import Format, partial_rows
from tests.support.command_line import invoke
from tests.support.processes import BIN, command, environment
from tests.support.python_clients import ServedLedger
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import SECONDS_MAX, wait_until

TEXTS = ("=1+1", "'quoted'", 'two\r\n"lines", one\ncell', "\ttab", "é\u2028☃", "", "-1", "\r\n")
ROWS = 3000
GRANT = TransactionKind.GRANT


@pytest.fixture(scope="module")
def client(ledger: ServedLedger) -> Iterator[Daybook]:
    """A client of the server."""
    with ledger.client() as client:
        yield client


@pytest.fixture(scope="module")
def texts(client: Daybook) -> str:
    """The id of an account whose transactions have texts that are hard to write."""
    client.create_account("texts", AccountKind.SPACE)
    drafts = [
        NewTransaction(
            TransactionKind.CHARGE if number == 7 else GRANT,
            "gift",
            {1: "123456789012.000001", 7: "-0.000001"}.get(number, "0.5"),
            description=text,
            receipt_uri=f"https://acme.example/{number}",
            labels={"location": "a,b"},
            metadata={"text": text},
            ttl=timedelta(days=9) if number == 2 else None,
            priority=0 if number == 7 else number,
        )
        for number, text in enumerate(TEXTS)
    ]
    client.batch_create_transactions([Posting("accounts/texts", draft) for draft in drafts])
    return "texts"


@pytest.fixture(scope="module")
def large(client: Daybook) -> str:
    """The id of an account with a history of several hundred kilobytes."""
    client.create_account("large", AccountKind.SPACE)
    begin = datetime(2024, 1, 1, tzinfo=UTC)
    history = (
        PastTransaction(
            "accounts/large",
            NewTransaction(GRANT, "gift", 1, description=f"{number}\r\n" + "x" * 300),
            begin + timedelta(minutes=number),
            f"large-{number}",
        )
        for number in range(ROWS)
    )
    assert client.import_transactions(history).imported_count == ROWS
    return "large"


def from_server(ledger: ServedLedger, account: str, form: Format, expression: str = "") -> bytes:
    """Returns the file that the server itself writes, as over REST."""
    formats = {Format.CSV: ExportTransactionsRequest.CSV, Format.NDJSON: ExportTransactionsRequest.NDJSON}
    request = ExportTransactionsRequest(parent=f"accounts/{account}", format=formats[form], filter=expression)
    with grpc.insecure_channel(ledger.address) as channel:
        call = channel.unary_stream(
            "/daybook.v1.Ledger/ExportTransactions",
            ExportTransactionsRequest.SerializeToString,
            ExportTransactionsResponse.FromString,
        )
        parts = call(request, metadata=(("authorization", f"Bearer {ledger.key}"),))
        return b"".join(part.file.data for part in parts)


@pytest.mark.parametrize("form", [Format.CSV, Format.NDJSON])
def test_file_equals_the_one_of_the_server(
    connection: Mapping[str, str], ledger: ServedLedger, texts: str, tmp_path: Path, form: Format
) -> None:
    """A file, and standard output, have every byte of the file that the server exports over REST."""
    file = tmp_path / f"texts.{form}"
    result = invoke("export", str(file), "--account", texts, settings=connection)
    assert (result.exit_code, result.stdout) == (0, f"exported {len(TEXTS)} transactions to {file}\n")
    expected = from_server(ledger, texts, form)
    assert expected.count(b"accounts/texts") >= len(TEXTS)
    assert file.read_bytes() == expected
    assert invoke("export", "-", "--format", form, "--account", texts, settings=connection).stdout_bytes == expected
    assert list(tmp_path.glob("texts*")) == [file]


def test_parquet_has_exact_values(connection: Mapping[str, str], client: Daybook, texts: str, tmp_path: Path) -> None:
    """A Parquet file has decimals, times and texts as they are in the ledger, without apostrophes."""
    file = tmp_path / "texts.parquet"
    assert invoke("export", str(file), "--account", texts, settings=connection).exit_code == 0
    rows = pyarrow.parquet.read_table(file).to_pylist()
    found = list(client.list_transactions("accounts/texts"))
    assert {each.description for each in found} == set(TEXTS)
    for row, transaction in zip(rows, found, strict=True):
        for name in ("name", "sequence", "kind", "category", "state", "description", "receipt_uri", "request_id"):
            assert row[name] == getattr(transaction, name), name
        for name in ("amount", "expiring_amount", "permanent_amount", "balance_after", "priority"):
            assert row[name] == getattr(transaction, name), name
        for name in ("create_time", "expire_time"):
            assert row[name] == getattr(transaction, name), name
        assert (row["uid"], row["account"]) == (str(transaction.uid), "texts")
        assert json.loads(row["metadata"]) == transaction.metadata
        assert json.loads(row["labels"]) == transaction.labels
    assert list(tmp_path.glob("texts*")) == [file]


def test_parquet_without_pyarrow_is_refused_in_one_line(
    connection: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without pyarrow, the command says how to install it, before it exports anything."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    result = invoke("export", str(tmp_path / "a.parquet"), settings=connection)
    words = "daybook: Parquet requires pyarrow, which is not installed: pip install 'daybook[parquet]'\n"
    assert (result.exit_code, result.stderr) == (1, words)
    assert not list(tmp_path.glob("a*"))


def test_export_is_filtered_and_ordered_like_a_list(
    connection: Mapping[str, str], client: Daybook, texts: str, tmp_path: Path
) -> None:
    """--account, --filter and --order-by are those of a list. Without --account, all accounts are exported."""
    file = tmp_path / "part.ndjson"
    choice = ("--filter", "kind = GRANT", "--order-by", "create_time")
    assert invoke("export", str(file), "--account", texts, *choice, settings=connection).exit_code == 0
    found = [json.loads(line)["name"] for line in file.read_bytes().splitlines()]
    assert found == [
        each.name for each in client.list_transactions("accounts/texts", filter=choice[1], order_by=choice[3])
    ]
    assert len(found) == len(TEXTS) - 1
    client.create_transaction(client.create_account("other", AccountKind.SPACE).name, NewTransaction(GRANT, "gift", 1))
    assert invoke("export", str(file), settings=connection).exit_code == 0
    assert {json.loads(line)["name"].split("/")[1] for line in file.read_bytes().splitlines()} >= {"texts", "other"}


@pytest.mark.parametrize("form", [Format.CSV, Format.NDJSON])
def test_export_without_rows_is_complete(
    connection: Mapping[str, str], ledger: ServedLedger, texts: str, tmp_path: Path, form: Format
) -> None:
    """An export of nothing is a file with a header, or an empty one, like the server's."""
    file, nothing = tmp_path / f"empty.{form}", "kind = EXPIRATION"
    assert invoke("export", str(file), "--account", texts, "--filter", nothing, settings=connection).exit_code == 0
    assert file.read_bytes() == from_server(ledger, texts, form, nothing)


@pytest.mark.parametrize("form", [Format.CSV, Format.NDJSON])
def test_file_cut_anywhere_is_continued_to_the_same_bytes(
    ledger: ServedLedger, client: Daybook, texts: str, tmp_path: Path, form: Format
) -> None:
    """Whatever byte a file ends with, the rows after its last whole one complete it to the uninterrupted file."""
    content = from_server(ledger, texts, form)
    transactions = list(client.export_transactions(f"accounts/{texts}"))
    part, counts = tmp_path / "part", set()
    for end in range(len(content) + 1):
        part.write_bytes(content[:end])
        with partial_rows(part, form.form, resume=True) as rows:
            assert rows.last == (transactions[rows.count - 1].name if rows.count else "")
            counts.add(rows.count)
            for _ in rows.write(transactions[rows.count :]):
                pass
        assert part.read_bytes() == content
    assert counts == set(range(len(TEXTS) + 1))


@contextmanager
def begun(
    ledger: ServedLedger, connection: Mapping[str, str], folder: Path, written: Path, *arguments: str
) -> Iterator[tuple[subprocess.Popen[str], TcpProxy]]:
    """Yields a process that exports over a proxy and waits for the rest, once the file `written` has rows."""
    with TcpProxy.before(ledger.port) as proxy, (folder / "stdout").open("wb") as stdout:
        proxy.after(700_000, proxy.withhold_answers)
        process = subprocess.Popen(
            command("export", *arguments, "--address", f"127.0.0.1:{proxy.port}"),
            cwd=folder,
            env=environment(**connection),
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda: written.exists() and written.stat().st_size > 10_000, "the first rows in the file")
        yield process, proxy


@pytest.mark.parametrize("form", list(Format))
def test_export_continues_after_a_lost_connection(
    connection: Mapping[str, str], ledger: ServedLedger, large: str, tmp_path: Path, form: Format
) -> None:
    """A lost connection leaves an incomplete file and says how to continue; then the file has every row once."""
    file, part = tmp_path / f"large.{form}", tmp_path / f"large.{form}.part"
    arguments = (str(file), "--account", large)
    with begun(ledger, connection, tmp_path, part, *arguments) as (process, proxy):
        proxy.cut()
        _, stderr = process.communicate(timeout=SECONDS_MAX)
    assert process.returncode == 75
    assert stderr.count("\n") == 1
    assert stderr.endswith(f"; {part} has the rows so far: repeat the command with --resume\n")
    assert not file.exists()
    before = part.read_bytes()
    assert not before.endswith(b"\n")
    again = invoke("export", *arguments, settings=connection)
    assert (again.exit_code, again.stderr) == (
        1,
        f"daybook: {part} exists: continue it with --resume, or remove it\n",
    )
    assert part.read_bytes() == before
    assert invoke("export", *arguments, "--resume", settings=connection).exit_code == 0
    assert list(tmp_path.glob("large*")) == [file]
    if form is Format.PARQUET:
        assert pyarrow.parquet.read_table(file)["sequence"].to_pylist() == list(range(ROWS, 0, -1))
    else:
        assert file.read_bytes() == from_server(ledger, large, form)
        assert file.read_bytes().startswith(before)


def test_lost_connection_leaves_standard_output_incomplete(
    connection: Mapping[str, str], ledger: ServedLedger, large: str, tmp_path: Path
) -> None:
    """Standard output has no line break at its end if the export is incomplete."""
    stdout = tmp_path / "stdout"
    arguments = ("-", "--format", "csv", "--account", large)
    with begun(ledger, connection, tmp_path, stdout, *arguments) as (process, proxy):
        proxy.cut()
        process.communicate(timeout=SECONDS_MAX)
    assert process.returncode == 75
    written = stdout.read_bytes()
    assert from_server(ledger, large, Format.CSV).startswith(written)
    assert not written.endswith(b"\n")


def test_interrupted_export_is_continued(
    connection: Mapping[str, str], ledger: ServedLedger, large: str, tmp_path: Path
) -> None:
    """Ctrl-C ends an export with 130 and one line; --resume completes the file."""
    file, part = tmp_path / "large.csv", tmp_path / "large.csv.part"
    arguments = (str(file), "--account", large)
    with begun(ledger, connection, tmp_path, part, *arguments) as (process, _):
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=SECONDS_MAX)
    assert process.returncode == 130
    assert stderr == f"daybook: interrupted; {part} has the rows so far: repeat the command with --resume\n"
    assert invoke("export", *arguments, "--resume", settings=connection).exit_code == 0
    assert file.read_bytes() == from_server(ledger, large, Format.CSV)


def test_full_disk_is_reported_and_the_export_continued(
    connection: Mapping[str, str], ledger: ServedLedger, large: str, tmp_path: Path
) -> None:
    """If a file can't grow, the error has its name and says how to continue."""
    part = tmp_path / "large.csv.part"
    # The limit of the size of a file, in units of 512 bytes.
    script = f"ulimit -f 1200; exec {BIN}/daybook export large.csv --account {large}"
    result = subprocess.run(
        ["sh", "-c", script],
        cwd=tmp_path,
        env=environment(**connection),
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    words = f"daybook: {part.name}: File too large; {part.name} has the rows so far: repeat the command with --resume\n"
    assert (result.returncode, result.stderr) == (1, words)
    file = tmp_path / "large.csv"
    assert invoke("export", str(file), "--account", large, "--resume", settings=connection).exit_code == 0
    assert file.read_bytes() == from_server(ledger, large, Format.CSV)


def test_export_into_a_missing_folder_is_refused(connection: Mapping[str, str], tmp_path: Path) -> None:
    """A file that can't be created is reported in one line."""
    result = invoke("export", str(tmp_path / "none" / "a.csv"), settings=connection)
    assert (result.exit_code, result.stderr) == (1, f"daybook: {tmp_path}/none/a.csv.part: No such file or directory\n")


def test_export_onto_a_folder_is_refused(connection: Mapping[str, str], tmp_path: Path) -> None:
    """A folder is refused before the rows are read."""
    (tmp_path / "a.csv").mkdir()
    result = invoke("export", str(tmp_path / "a.csv"), settings=connection)
    assert result.exit_code == 2
    assert "is a directory" in result.stderr
    assert [*tmp_path.iterdir()] == [tmp_path / "a.csv"]


def test_failed_export_without_rows_leaves_nothing(connection: Mapping[str, str], tmp_path: Path) -> None:
    """An export that is refused keeps the file of an earlier one, and leaves no incomplete file."""
    file = tmp_path / "a.csv"
    file.write_text("earlier")
    for arguments, status in ((("--account", "nothing"), 3), (("--filter", "kind ="), 2)):
        assert invoke("export", str(file), *arguments, settings=connection).exit_code == status
    assert [(each, each.read_text()) for each in tmp_path.glob("a*")] == [(file, "earlier")]


def test_complete_export_replaces_the_file(connection: Mapping[str, str], texts: str, tmp_path: Path) -> None:
    """--resume without an incomplete file exports everything, and the file is replaced."""
    file = tmp_path / "a.ndjson"
    file.write_text("earlier")
    assert invoke("export", str(file), "--account", texts, "--resume", settings=connection).exit_code == 0
    assert file.read_bytes().count(b"\n") == len(TEXTS)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"name,amount\r\naccounts/a/transactions/b,1\r\n", "has other columns than this version exports: remove it"),
        (
            b"\xef\xbb\xbf" + Format.CSV.form.header[1:].encode() + b"\r\nb\r\n",
            "is no export: its last row has no name",
        ),
    ],
)
def test_other_file_is_not_continued(connection: Mapping[str, str], tmp_path: Path, content: bytes, words: str) -> None:
    """A file that is no export, or of other columns, is refused and kept."""
    part = tmp_path / "a.csv.part"
    part.write_bytes(content)
    result = invoke("export", str(tmp_path / "a.csv"), "--resume", settings=connection)
    assert (result.exit_code, result.stderr) == (1, f"daybook: {part} {words}\n")
    assert part.read_bytes() == content


def test_two_exports_do_not_write_to_the_same_file(connection: Mapping[str, str], tmp_path: Path) -> None:
    """While an export writes to a file, another one is refused and leaves the file unchanged."""
    part = tmp_path / "a.csv.part"
    with part.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = invoke("export", str(tmp_path / "a.csv"), "--resume", settings=connection)
        assert (result.exit_code, result.stderr) == (1, f"daybook: another export is writing to {part}\n")
    assert part.exists()


@pytest.mark.parametrize(
    "arguments", [("a",), ("a.txt",), ("-",), ("-", "--format", "parquet"), ("-", "--format", "csv", "--resume")]
)
def test_impossible_format_is_refused(connection: Mapping[str, str], arguments: tuple[str, ...]) -> None:
    """A file without a known ending needs --format; standard output takes neither Parquet nor --resume."""
    assert invoke("export", *arguments, settings=connection).exit_code == 2
