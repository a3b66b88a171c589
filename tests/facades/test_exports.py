"""Exports over REST: whole exchanges, errors before and after the first line, and files that are cut off."""

from __future__ import annotations

import gzip
import http.client
import json
from pathlib import Path
from urllib.parse import urlsplit

import brotli
import pytest

from tests.support.gateways import torn
from tests.support.http_client import send
from tests.support.processes import Daybook
from tests.support.rest import KEY, Rest, reason_of

CSV_HEADER = (
    "\ufeffname,account,uid,sequence,create_time,kind,category,state,amount,expiring_amount,permanent_amount,"
    "balance_after,description,owner,creator,labels,receipt_uri,metadata,request_id,refund_of,transfer_peer,"
    "expire_time,priority,booking,order,event_ticket,usage\r\n"
)


def export(rest: Rest, account_id: str, query: str) -> tuple[str | None, str | None, str]:
    """Exports an account. Returns the content type, the disposition and the file."""
    answer = rest.send("GET", f"/v1/accounts/{account_id}/transactions:export?{query}")
    assert answer.status == 200, answer.body
    return answer.header("content-type"), answer.header("content-disposition"), answer.body.decode()


def test_csv_exchange(rest: Rest) -> None:
    """A CSV export has the header, a line per transaction, and headers with which browsers save it."""
    account = rest.account()
    grant = rest.post(account, "GRANT", "10.5", description='=2+3, "quoted"', labels={"location": "L"})
    charge = rest.post(account, "CHARGE", "-0.25", metadata={"count": 5, "ratio": 0.5})
    content_type, disposition, text = export(rest, account, "format=CSV&orderBy=create_time")
    assert content_type == "text/csv; charset=utf-8"
    assert disposition == f'attachment; filename="transactions-{account}.csv"'

    def start(posted: dict[str, object], number: int) -> str:
        time = text.splitlines()[number].split(",")[4]
        return f"{posted['name']},{account},{posted['uid']},{number},{time}"

    assert text == CSV_HEADER + (
        f"{start(dict(grant), 1)},GRANT,test,SUCCEEDED,10.5,0,10.5,10.5,"
        '"\'=2+3, ""quoted""",,,"{""location"":""L""}",,,,,,,0,,,,\r\n'
        f"{start(dict(charge), 2)},CHARGE,test,SUCCEEDED,-0.25,0,-0.25,10.25,"
        ',,,,,"{""count"":5,""ratio"":0.5}",,,,,0,,,,\r\n'
    )


def test_ndjson_exchange(rest: Rest) -> None:
    """Each line of an NDJSON export is a transaction of the list, with the same keys and values."""
    account = rest.account()
    rest.post(account, "GRANT", "10.5", description='é \\ " \t \u2028 <&>', labels={"location": "L", "a": "b"})
    usage = {"model": "m", "inputTokens": "5", "costUsd": "0.1"}
    rest.post(account, "CHARGE", "-0.25", metadata={"count": 5, "ratio": 0.5, "list": [None, True]}, usage=usage)
    owner = {"id": "u", "name": "Ann"}
    rest.post(
        account, "GRANT", "1", ttl="3600s", owner=owner, creator=owner, booking={"id": "b", "resource": {"id": "r"}}
    )
    content_type, disposition, text = export(rest, account, "format=NDJSON")
    assert content_type == "application/x-ndjson"
    assert disposition == f'attachment; filename="transactions-{account}.ndjson"'
    listed = json.loads(rest.send("GET", f"/v1/accounts/{account}/transactions").body)["transactions"]
    *lines, end = text.split("\n")
    assert [json.loads(line) for line in lines] == listed
    assert len(lines) == 3
    assert end == ""


def test_export_of_the_tenant_has_the_list(rest: Rest) -> None:
    """An export of all accounts has every transaction of all pages of the list."""
    names: list[str] = []
    token = ""
    while not names or token:
        page = json.loads(rest.send("GET", f"/v1/accounts/-/transactions?pageSize=1000&pageToken={token}").body)
        names += [each["name"] for each in page["transactions"]]
        token = page["nextPageToken"]
    _, disposition, text = export(rest, "-", "format=NDJSON")
    assert [json.loads(line)["name"] for line in text.split("\n")[:-1]] == names
    assert disposition == 'attachment; filename="transactions.ndjson"'


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("", "format"),
        ("format=FORMAT_UNSPECIFIED", "format"),
        ("format=CSV&filter=x", "filter"),
        ("format=CSV&lastTransaction=x", "last_transaction"),
        ("format=CSV&pageSize=1", "pageSize"),
        ("format=CSV&format=CSV", "format"),
    ],
)
def test_invalid_parameter_is_refused(rest: Rest, query: str, field: str) -> None:
    """An invalid, unknown or missing parameter gets 400 with its name, in the error format of the API."""
    answer = rest.send("GET", f"/v1/accounts/-/transactions:export?{query}")
    assert answer.status == 400
    assert answer.header("content-type") == "application/json"
    assert reason_of(answer.json())[2] == [field]


def test_missing_account_is_refused(rest: Rest) -> None:
    """An unknown account gets 404 in the error format of the API, and no file."""
    answer = rest.send("GET", "/v1/accounts/none/transactions:export?format=CSV")
    assert (answer.status, reason_of(answer.json())[0]) == (404, "ACCOUNT_NOT_FOUND")
    assert answer.header("content-disposition") is None


def test_head_has_the_headers_of_the_file(rest: Rest) -> None:
    """HEAD has the headers of GET and no body."""
    answer = rest.send("HEAD", "/v1/accounts/-/transactions:export?format=CSV")
    assert (answer.status, answer.body) == (200, b"")
    assert answer.header("content-type") == "text/csv; charset=utf-8"
    assert answer.header("content-disposition") == 'attachment; filename="transactions.csv"'


def post_many(rest: Rest) -> str:
    """Creates an account with 500 transactions, which are several parts of a file. Returns its id."""
    account = rest.account()
    one = {"transaction": {"kind": "GRANT", "category": "test", "amount": "1", "description": "x" * 500}}
    rest.call("POST", f"/v1/accounts/{account}/transactions:batchCreate", {"requests": [one] * 500})
    return account


@pytest.mark.parametrize("form", ["CSV", "NDJSON"])
def test_file_of_a_failed_export_is_cut_off(gateway: Daybook, rest: Rest, tmp_path: Path, form: str) -> None:
    """If an export fails after the first line, the response lacks its last chunk, and the file its last line break."""
    account = post_many(rest)
    with torn(gateway, tmp_path) as origin:
        connection = http.client.HTTPConnection(urlsplit(origin).netloc, timeout=60)
        target = f"/v1/accounts/{account}/transactions:export?format={form}"
        connection.request("GET", target, headers={"authorization": f"Bearer {KEY}"})
        response = connection.getresponse()
        assert response.status == 200
        with pytest.raises(http.client.IncompleteRead) as caught:
            response.read()
        connection.close()
        assert caught.value.partial
        assert not caught.value.partial.endswith(b"\n")
        # Before the first line, the error is the answer.
        answer = send(origin, f"{target}&orderBy=create_time", headers={"authorization": f"Bearer {KEY}"})
        assert (answer.status, reason_of(answer.json())[0]) == (500, "INTERNAL_FAILURE")
        assert answer.header("content-disposition") is None


@pytest.mark.parametrize("encoding", ["gzip", "br"])
def test_compressed_file_is_complete(rest: Rest, encoding: str) -> None:
    """A compressed file has the same content."""
    account = post_many(rest)
    target = f"/v1/accounts/{account}/transactions:export?format=NDJSON"
    plain = rest.send("GET", target)
    packed = rest.send("GET", target, **{"accept-encoding": encoding})
    assert packed.header("content-encoding") == encoding
    assert decoded(packed.body, encoding) == plain.body
    assert len(packed.body) < len(plain.body) / 5


def decoded(body: bytes, encoding: str) -> bytes:
    """A body without its compression."""
    return gzip.decompress(body) if encoding == "gzip" else bytes(brotli.decompress(body))
