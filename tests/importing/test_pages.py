"""`daybook import` from saved pages of vendors: dry runs, repetitions, interruptions, bad rows."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from daybook_client import Daybook, NewTransaction, TransactionKind
from server.cli.connection import REFUSED
from server.importing import posting
from server.importing.found import Options, Page
from server.importing.gathering import gather
from server.importing.http import parse_json
from server.importing.plan import make_plan
from server.importing.posting import create_accounts, post
from server.importing.readers import reader
from server.importing.spool import Spool
from tests.support.importing import Importer
from tests.support.processes import free_port

NEBULABLOCK = ("--from", "nebulablock")
TEABLE = ("--from", "teable", "--account", "spcOne")


def hour(number: int, computing: float, serverless: float = 0.0) -> dict[str, Any]:
    """An hour of user 7, some hours after 1 January 2025 in New York."""
    start = datetime(2025, 1, 1, 0, 30) + timedelta(hours=number)  # noqa: DTZ001  # a wall time
    return {
        "user_id": 7,
        "computing_amount": computing,
        "serverless_amount": serverless,
        "create_time": f"EST {start}",
        "update_time": f"EST {start + timedelta(hours=1)}",
        "total": computing + serverless,
    }


def hours_page(balance: float, *hours: dict[str, Any]) -> dict[str, Any]:
    """A page with these hours, newest first."""
    return {"data": {"credit_balance": balance, "credit_history": [*hours], "total_credit_histories": len(hours)}}


def record(number: int, name: str = "", **more: Any) -> dict[str, Any]:
    """A record of Teable, some seconds after 1 January 2025."""
    return {
        "id": f"rec{number}",
        "sourceType": "ai_chat",
        "amount": 1.5,
        "createdTime": f"2025-01-01T00:00:{number:02}.000Z",
        "displayName": name or None,
        "user": None,
        **more,
    }


def saved(folder: Path, content: Any, name: str = "page.json") -> str:
    """Writes a page to a file."""
    (folder / name).write_text(json.dumps(content))
    return str(folder / name)


def test_dry_run_changes_nothing(importer: Importer, tmp_path: Path) -> None:
    """A dry run shows the accounts, the counts, the sums and the times of the import, and changes nothing."""
    page = saved(tmp_path, hours_page(10, hour(2, 2, 0.5), hour(0, 1)))
    output = importer.imported(*NEBULABLOCK, page, "--dry-run")
    assert importer.state() == {}
    assert [line.split() for line in output.splitlines()] == [
        ["1", "of", "1", "accounts", "to", "create"],
        ["7", "USER"],
        ["kind", "category", "state", "count", "sum"],
        ["CHARGE", "computing", "SUCCEEDED", "2", "-3"],
        ["CHARGE", "serverless", "SUCCEEDED", "1", "-0.5"],
        ["GRANT", "opening_balance", "SUCCEEDED", "1", "13.5"],
        ["total", "4", "10"],
        ["from", "2025-01-01T05:30:00.000000Z", "to", "2025-01-01T07:30:00.000000Z"],
    ]


def test_later_import_adds_what_is_new(importer: Importer, tmp_path: Path) -> None:
    """A second import adds new rows, and brings forward only credits that were bought in between."""
    first = saved(tmp_path, hours_page(10, hour(0, 1)), "first.json")
    importer.imported(*NEBULABLOCK, first)
    second = saved(tmp_path, hours_page(28, hour(1, 2), hour(0, 1)), "second.json")
    importer.imported(*NEBULABLOCK, second)
    expected = ["GRANT opening_balance 11", "CHARGE computing -1", "GRANT opening_balance 20", "CHARGE computing -2"]
    assert importer.state() == {"7": expected}
    for page in (first, second):
        assert "0 transactions imported" in importer.imported(*NEBULABLOCK, page)
    assert importer.state() == {"7": expected}


def test_hour_that_is_not_over_is_left_out(importer: Importer, tmp_path: Path) -> None:
    """The present hour still changes, so it comes with a later import, and the balance is that before it."""
    now = datetime.now(ZoneInfo("America/New_York")).replace(tzinfo=None, microsecond=0)
    start = now - timedelta(minutes=10)
    current = {**hour(0, 5), "create_time": f"EST {start}", "update_time": f"EST {start + timedelta(hours=1)}"}
    before = start - timedelta(hours=24)
    past = {**hour(0, 1), "create_time": f"EST {before}", "update_time": f"EST {before + timedelta(hours=1)}"}
    importer.imported(*NEBULABLOCK, saved(tmp_path, hours_page(10, current, past)))
    assert importer.state() == {"7": ["GRANT opening_balance 16", "CHARGE computing -1"]}


@pytest.mark.parametrize("balance", [0.25, 40])
def test_interrupted_import_continues(importer: Importer, tmp_path: Path, balance: float) -> None:
    """After an interruption at any item, the same command adds the rest once."""
    # The balance of 0.25 is below what the grant that is shown leaves, so a correction ends the history.
    rows = [
        {"id": "4", "amount": -3, "transaction_type": "usage", "created_at": "2025-01-01T00:00:02Z"},
        {"id": "3", "amount": 20, "transaction_type": "purchase", "created_at": "2025-01-01T00:00:01Z"},
        {"id": "2", "amount": -2, "transaction_type": "usage", "created_at": "2025-01-01T00:00:01Z"},
        {"id": "1", "amount": -1, "transaction_type": "usage", "created_at": "2025-01-01T00:00:01Z"},
    ]
    contents: dict[str, Any] = {"balance": {"balance": balance}, "rows": rows}
    options = {"now": datetime.now(UTC), "expire_time": datetime(9000, 1, 1, tzinfo=UTC)}
    for count in range(7):
        organization = f"org{count}"
        reading = Options(account_id=organization, **options)  # type: ignore[arg-type]  # names and values match
        pages = [Page(name, parse_json(json.dumps(each))) for name, each in contents.items()]
        with Spool("dreadnode", newest_first=True) as spool:
            gathered = gather(reader("dreadnode").rows(pages, reading), spool, reading, lambda _count: None)
            plan = make_plan("dreadnode", spool, gathered, importer.client, reading)
            create_accounts(plan, importer.client)
            post(plan, islice(plan.items(spool), count), importer.client, lambda _count: None)
        files = [saved(tmp_path, each, f"{name}.json") for name, each in contents.items()]
        importer.imported("--from", "dreadnode", "--account", organization, *files)
        assert float(importer.client.get_balance(f"accounts/{organization}").amount) == balance
    states = list(importer.state().values())
    assert states == [states[0]] * 7
    assert len(states[0]) == (6 if balance < 1 else 5)


def test_row_that_changed_is_reported(importer: Importer, tmp_path: Path) -> None:
    """A row that the vendor has changed since its import stays as it is, and the rows after it are imported."""
    importer.imported(*TEABLE, saved(tmp_path, {"data": [record(2, "old"), record(1)], "nextCursor": None}))
    page = saved(tmp_path, {"data": [record(3), record(2, "new"), record(1)], "nextCursor": None})
    result = importer.run(*TEABLE, page)
    assert result.exit_code == 0
    assert "2 transactions imported, 1 already there" in result.stdout
    assert result.stderr == (
        "teable:rec2: not imported: a row with this request_id and other content was imported before\n"
    )
    assert [each.description for each in importer.client.list_transactions("accounts/spcOne", order_by="amount")]
    assert importer.state()["spcOne"].count("CHARGE ai_chat -1.5") == 3


def test_many_changed_rows_are_sent_once(importer: Importer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed row ends its call. The rows after it are not all sent again and again, and too many end the import."""
    records = [record(number) for number in range(50, -1, -1)]
    importer.imported(*TEABLE, saved(tmp_path, {"data": records[:-1], "nextCursor": None}))
    sent: list[int] = []
    send = Daybook.import_transactions

    def counted(self: Daybook, items: Any, **more: Any) -> Any:
        sent.append(len(items))
        return send(self, items, **more)

    monkeypatch.setattr(Daybook, "import_transactions", counted)
    changed = [record(number, "new" if 10 < number < 40 else "") for number in range(51, 0, -1)]
    page = saved(tmp_path, {"data": changed, "nextCursor": None})
    result = importer.run(*TEABLE, page)
    assert result.exit_code == 0
    assert result.stderr.count("not imported") == 29
    assert "2 transactions imported, 21 already there" in result.stdout
    assert sum(sent) < 4 * len(changed)
    monkeypatch.setattr(posting, "CHANGED_MAX", 3)
    result = importer.run(*TEABLE, page)
    assert result.exit_code == REFUSED
    assert "3 rows, the first of them teable:rec11, differ from imported rows" in result.stderr


def test_bad_rows_stop_the_import(importer: Importer, tmp_path: Path) -> None:
    """Each row that can't be imported is reported with its place and its reason; the others wait for a flag."""
    bad: list[dict[str, Any]] = [
        record(9, amount=0),
        record(8, amount=0.0000001),
        record(7, sourceType="unknown"),
        record(6, createdTime="yesterday"),
        record(5, createdTime="2999-01-01T00:00:00Z"),
        record(4, user={"id": "", "name": "", "avatar": None}),
        record(3, "x" * 1025),
    ]
    page = saved(tmp_path, {"data": [*bad, record(1)], "nextCursor": None})
    result = importer.run(*TEABLE, page)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "7 rows can't be imported:",
        f"  {page}, row 1: amount must be below 0 for a CHARGE",
        f"  {page}, row 2: amount has more than 6 digits after the point: 1E-7",
        f"  {page}, row 3: sourceType 'unknown' is unknown",
        f"  {page}, row 4: createdTime must be a time like 2025-01-31T12:00:00Z",
        f"  {page}, row 5: create_time is in the future",
        f"  {page}, row 6: id is missing",
        f"  {page}, row 7: description must have at most 1024 characters",
        "Nothing is imported: see --skip-bad-rows.",
    ]
    assert importer.state() == {}
    assert importer.run(*TEABLE, page, "--skip-bad-rows").exit_code == 0
    assert importer.state() == {"spcOne": ["GRANT opening_balance 1.5", "CHARGE ai_chat -1.5"]}


def test_documented_row_without_required_fields_is_reported(importer: Importer, tmp_path: Path) -> None:
    """The example of Dreadnode's page has neither an id, an amount nor a time."""
    page = saved(tmp_path, [{"has_receipt": False, "transaction_type": "purchase"}])
    result = importer.run("--from", "dreadnode", "--account", "org", page)
    assert result.exit_code == 1
    assert f"{page}, row 1: amount is missing" in result.stderr


def test_history_before_other_transactions_is_refused(importer: Importer, tmp_path: Path) -> None:
    """Rows before the account's newest transaction can't be imported; the refusal names the row."""
    importer.imported(*TEABLE, saved(tmp_path, {"data": [record(5), record(3)], "nextCursor": None}))
    before = importer.state()
    # The first row is checked before anything is posted, also in a dry run.
    page = saved(tmp_path, {"data": [record(6), record(2)], "nextCursor": None})
    for flags in ((), ("--dry-run",)):
        result = importer.run(*TEABLE, page, *flags)
        assert result.exit_code == REFUSED
        assert "teable:rec2 of accounts/spcOne at 2025-01-01T00:00:02+00:00 is not in the ledger" in result.stderr
        assert "newest transaction is of 2025-01-01T00:00:05Z" in result.stderr
        assert importer.state() == before
    result = importer.run(*TEABLE, saved(tmp_path, {"data": [record(4), record(3)], "nextCursor": None}))
    assert result.exit_code == REFUSED
    assert "teable:rec4 of accounts/spcOne at 2025-01-01T00:00:04+00:00" in result.stderr


def test_numbers_are_exact_apart_from_rounding_errors(importer: Importer, tmp_path: Path) -> None:
    """An error of floating point is rounded away; more digits, or too many, are a bad row."""
    page = tmp_path / "page.json"
    rows = [json.dumps(record(number, amount="AMOUNT")) for number in range(6)]
    amounts = ["0.30000000000000004", "1e999999999", "1" + "0" * 40, "1e-999999999", "0.3000001", "2.0049999999999999"]
    written = (row.replace('"AMOUNT"', amount) for row, amount in zip(rows, amounts, strict=True))
    page.write_text(f'{{"data": [{",".join(written)}], "nextCursor": null}}')
    result = importer.run(*TEABLE, str(page), "--skip-bad-rows")
    assert [line.partition(": ")[2] for line in result.stderr.splitlines()[1:]] == [
        "amount has more than 15 digits before the point",
        "amount has more than 15 digits before the point",
        "amount must be below 0 for a CHARGE",
        "amount has more than 6 digits after the point: 0.3000001",
    ]
    assert importer.state() == {
        "spcOne": ["GRANT opening_balance 2.305", "CHARGE ai_chat -0.3", "CHARGE ai_chat -2.005"]
    }


def test_description_of_an_account_is_checked(importer: Importer, tmp_path: Path) -> None:
    """A profile that an account can't have is reported before anything is posted; with a flag it is left out."""
    row = {
        "id": "1",
        "type": "creditPackage",
        "amount": 5,
        "createDate": "2025-01-01T00:00:00Z",
        "companyRef": "c1",
        "company": {"id": "c1", "title": "x" * 5000},
    }
    page = saved(tmp_path, {"transactions": [row]})
    result = importer.run("--from", "spacebring", page)
    assert result.exit_code == 1
    assert "account c1: display_name must have at most 255 characters" in result.stderr
    assert importer.state() == {}
    assert importer.run("--from", "spacebring", page, "--skip-bad-rows").exit_code == 0
    assert importer.state() == {"c1": ["GRANT credit_package 5"]}


def test_balance_without_rows_is_reported(importer: Importer, tmp_path: Path) -> None:
    """A balance that no new row can bring forward is shown, so that the user can grant the difference."""
    page = saved(tmp_path, hours_page(10, hour(0, 1)))
    reason = "credits more, and no new row from which to bring them forward: grant them"
    output = importer.imported(*NEBULABLOCK, page, "--since", "2025-06-01T00:00:00Z", "--dry-run")
    assert f"accounts/7: has 10 {reason}" in output
    assert "differences" not in importer.imported(*NEBULABLOCK, page)
    assert "differences" not in importer.imported(*NEBULABLOCK, page)
    output = importer.imported(*NEBULABLOCK, saved(tmp_path, hours_page(25, hour(0, 1))))
    assert f"accounts/7: has 15 {reason}" in output
    importer.client.create_transaction("accounts/7", NewTransaction(TransactionKind.GRANT, "top_up", 15))
    assert "differences" not in importer.imported(*NEBULABLOCK, saved(tmp_path, hours_page(25, hour(0, 1))))


def test_unanswered_import_says_how_to_continue(importer: Importer, tmp_path: Path) -> None:
    """If the server can't be reached, the advice is to repeat the command: it has no request_id."""
    page = saved(tmp_path, {"data": [record(1)], "nextCursor": None})
    result = importer.run(*TEABLE, page, "--address", f"127.0.0.1:{free_port()}")
    assert result.exit_code == 75
    assert result.stderr.endswith("; run the same command again to continue\n")
    assert "--request-id" not in result.stderr


def test_transfer_without_its_other_side_is_reported(importer: Importer, tmp_path: Path) -> None:
    """The direction of a transfer is known only if both of its rows are there, of a company and a membership."""
    side = {
        "id": "1",
        "type": "transferPermanentCredits",
        "amount": 5,
        "permanentAmount": 5,
        "createDate": "2025-01-01T00:00:00Z",
        "companyRef": "company",
        "membershipRef": "membership",
    }
    page = saved(tmp_path, {"transactions": [side, {**side, "id": "2", "membershipRef": None}]})
    result = importer.run("--from", "spacebring", page)
    assert result.exit_code == 1
    assert f"{page}, row 1: is one side of a transfer without the other" in result.stderr
    assert f"{page}, row 2: is a transfer without companyRef and membershipRef" in result.stderr


def test_charge_of_other_credits_is_reported(importer: Importer, tmp_path: Path) -> None:
    """A charge of permanent credits while expiring ones are left is imported, and the difference is shown."""
    common = {"companyRef": "company", "status": "succeeded"}
    page = saved(
        tmp_path,
        {
            "transactions": [
                {
                    **common,
                    "id": "2",
                    "type": "chargePermanentCredits",
                    "amount": 3,
                    "permanentAmount": 3,
                    "createDate": "2025-01-02T00:00:00Z",
                },
                {
                    **common,
                    "id": "1",
                    "type": "subscriptionRenewal",
                    "amount": 5,
                    "expiringAmount": 5,
                    "createDate": "2025-01-01T00:00:00Z",
                },
            ]
        },
    )
    output = importer.imported("--from", "spacebring", page)
    assert f"{page}, row 1: shows -3 expiring credits instead of 0" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--from", "unknown"), "there is no reader 'unknown'"),
        (("--from", "teable", "page.json"), "give --account"),
        (("--from", "nebulablock"), "documents no address"),
        (("--from", "spacebring"), "no token: set SOURCE_TOKEN"),
        (("--from", "nebulablock", "--source-address", "https://localhost", "page.json"), "not both"),
        ((), "give one CSV file"),
        (("--from", "teable", "--account", "a b", "page.json"), "'a b' can't be the id of an account"),
        (("--from", "nebulablock", __file__), "test_pages.py: "),
    ],
)
def test_wrong_arguments_get_one_line(importer: Importer, arguments: tuple[str, ...], message: str) -> None:
    """A mistake in the arguments gets a line that says what to do."""
    result = importer.run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_token_that_no_header_can_have_is_refused_unseen(importer: Importer, tmp_path: Path) -> None:
    """A token with a line break or another odd character gets a line, which does not show the token."""
    for token in ("secret\nline", "secr\u00e9t"):
        (tmp_path / "token").write_text(token)
        file = str(tmp_path / "token")
        result = importer.run(*TEABLE, "--source-address", "http://127.0.0.1:1", "--source-token-file", file)
        assert (result.exit_code, result.stderr) == (
            2,
            "daybook: the token of the source has characters other than printable ASCII\n",
        )


def test_mapping_is_refused_with_a_vendor(importer: Importer) -> None:
    """Flags for CSV files are not ignored."""
    result = importer.run(*TEABLE, "page.json", "--set", "category=x")
    assert result.exit_code == 2
    assert "without --from" in result.stderr
