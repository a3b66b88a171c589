"""No query, header or body causes a 5xx answer, and each refusal has the vendor's error format."""

from __future__ import annotations

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.demo import spacebring
from tests.support.examples import examples
from tests.support.http_client import send
from tests.support.processes import Daybook
from tests.support.vendors import APIS, Api, ask, require_sound, without_token

# All characters that HTTP allows in a request line, and valid and invalid percent escapes of other bytes.
visible = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="#"), max_size=12)
escaped = st.binary(max_size=6).map(lambda content: "".join(f"%{byte:02X}" for byte in content))
unicode_escaped = st.text(max_size=4).map(
    lambda text: "".join(f"%{byte:02x}" for byte in text.encode("utf-8", "surrogatepass"))
)
broken = st.sampled_from(["%", "%2", "%zz", "%%", "%u0041", "100%", "%C3%28", "%ED%A0%80", "%00", "+", "%0d%0a"])
numbers = st.one_of(st.integers(), st.integers(-(2**70), 2**70), st.floats()).map(str)
plausible = st.sampled_from(
    [
        "2024-10",
        "2024-13",
        "0000-01",
        "9999-12",
        "ai_chat",
        "asc",
        "amount",
        "purchase",
        "50",
        "1e3",
        "true",
        "null",
        "2024-10-22T12:00:00Z",
        "0001-01-01T00:00:00+23:59",
        "9999-12-31T23:59:59-23:59",
        spacebring.HARBOUR,
        "-0",
        "0x10",
    ]
)
values = st.one_of(st.just(""), visible, escaped, unicode_escaped, broken, numbers, plausible)


def queries(api: Api) -> st.SearchStrategy[str]:
    """Query strings: known and unknown names, repeated, empty, without `=`."""
    names = st.one_of(st.sampled_from(api.parameters), st.sampled_from(api.parameters), visible, escaped, broken)
    pairs = st.one_of(st.tuples(names, values).map("=".join), names)
    return st.lists(pairs, max_size=5).map("&".join)


@pytest.mark.parametrize("name", APIS)
def test_random_query(gateway: Daybook, name: str) -> None:
    """An API answers or refuses every query string in its documented format."""
    api = APIS[name]

    @settings(max_examples=examples(40), deadline=None, database=None, derandomize=True)
    @given(query=queries(api), good=st.booleans())
    def check(query: str, *, good: bool) -> None:
        target = f"{api.path}?{api.good + '&' if good else ''}{query}"
        require_sound(api, target, ask(gateway, api, target))

    check()


@pytest.mark.parametrize("name", ["teable", "teable-without-api", "dreadnode", "paged"])
def test_random_account(gateway: Daybook, name: str) -> None:
    """An account id in the path that does not exist is refused in the documented format."""
    api = APIS[name]
    prefix, suffix = api.path.replace("spcExampleStudio", "{}").replace("/example/", "/{}/").split("{}")
    # Without dots, which could lead up the path to another account.
    unreserved = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8).map(
        lambda text: "".join(f"%{byte:02X}" for byte in text.encode())
    )

    @settings(max_examples=examples(25), deadline=None, database=None, derandomize=True)
    @given(account=st.one_of(unreserved, escaped.filter(bool), st.sampled_from(["%zz", "-", "a%2Fb", "*", "x" * 300])))
    @example(account="%FF")
    def check(account: str) -> None:
        target = f"{prefix}{account}{suffix}?{api.good}"
        answer = ask(gateway, api, target)
        require_sound(api, target, answer)
        assert answer.status != 200, target

    check()


@pytest.mark.parametrize("name", ["teable", "teable-without-api", "dreadnode", "paged"])
def test_path_with_nul_has_the_vendors_error(gateway: Daybook, name: str) -> None:
    """The gateway refuses a path with a NUL byte with the vendor's error body and a message."""
    api = APIS[name]
    target = api.path.replace("spcExampleStudio", "a%00b").replace("/example/", "/a%00b/")
    answer = ask(gateway, api, target)
    require_sound(api, target, answer)
    body = answer.json()
    assert isinstance(body, dict)
    message = body.get("message", body.get("detail"))
    assert isinstance(message, str)
    assert message.removeprefix("Validation error: ")
    assert b'""' not in answer.body


@pytest.mark.parametrize("name", APIS)
def test_invalid_utf_8_is_refused(gateway: Daybook, name: str) -> None:
    """A parameter that is not valid UTF-8 gets a 4xx answer."""
    api = APIS[name]
    for parameter in api.parameters:
        for value in ("%FF", "%C3%28", "%ED%A0%80"):
            # The good query has a month; a second month would be another error.
            target = f"{api.path}?{api.good if parameter != 'month' else ''}&{parameter}={value}"
            answer = ask(gateway, api, target)
            require_sound(api, target, answer)
            # Spacebring has no parameter `createDate`, so it may ignore it.
            assert answer.status in (400, 422) or parameter == "createDate", target


def test_too_long_query_is_refused(gateway: Daybook) -> None:
    """A query that is too long for the gateway gets a 4xx answer."""
    padding = "".join(random.Random(1).choices("abcdef", k=30_000))
    answer = send(gateway.origin, f"/users/credits/history?x={padding}")
    assert 400 <= answer.status < 500


# Names with a meaning for the gateway, gRPC or the server, without those that delimit the request.
header_names = st.sampled_from(
    [
        "authorization",
        "x-api-key",
        "spacebring-network-id",
        "accept",
        "accept-encoding",
        "content-encoding",
        "content-type",
        "cookie",
        "forwarded",
        "grpc-accept-encoding",
        "grpc-encoding",
        "grpc-timeout",
        "if-none-match",
        "origin",
        "range",
        "te",
        "traceparent",
        "x-envoy-original-path",
        "x-envoy-upstream-rq-timeout-ms",
        "x-error-body",
        "x-error-status",
        "x-forwarded-for",
        "x-http-method-override",
        "x-request-id",
        "x-bin",
        "x_underscore",
    ]
)
# Every byte that HTTP allows in a header.
header_bytes = st.lists(st.sampled_from([0x09, *range(0x20, 0x7F), *range(0x80, 0x100)]), max_size=12).map(
    lambda content: bytes(content).decode(errors="surrogateescape")
)
header_values = st.one_of(
    header_bytes,
    st.sampled_from(
        ["Bearer", "Basic", "bearer ", "Basic Og==", "Basic \udcff", "Bearer .", "gzip;q=x", "*", "0", "1S"]
    ),
)


@pytest.mark.parametrize("name", APIS)
def test_random_headers(gateway: Daybook, name: str) -> None:
    """Random headers are ignored, or refused in the documented format if they replace a good credential."""
    api = APIS[name]
    good = {"authorization": f"Bearer {api.key}.public", "spacebring-network-id": spacebring.NETWORK}
    target = f"{api.path}?{api.good}"

    @settings(max_examples=examples(40), deadline=None, database=None, derandomize=True)
    @given(headers=st.dictionaries(header_names, header_values, max_size=4))
    def check(headers: dict[str, str]) -> None:
        answer = send(gateway.origin, target, headers={**good, **headers})
        require_sound(api, f"{target} {headers}", answer)
        assert answer.status == 200 or headers.keys() & {*good, "x-api-key"}, headers

    check()


@pytest.mark.parametrize(
    "body",
    [
        b'{"limit": "101", "take": "101", "org": "other", "spaceId": "other", "companyRef": "x"}',
        b"{}",
        b"[1]",
        b"{",
        b"limit=101&take=101",
        b"\xff" * 70_000,
    ],
    ids=["fields", "nothing", "list", "broken", "form", "long"],
)
@pytest.mark.parametrize("name", APIS)
def test_body_of_a_get_is_ignored(gateway: Daybook, name: str, body: bytes) -> None:
    """A GET with a body has the same answer as without it."""
    api = APIS[name]
    target = f"{api.path}?{api.good}"
    headers = {
        "authorization": f"Bearer {api.key}.public",
        "spacebring-network-id": spacebring.NETWORK,
        "content-type": "application/json",
    }
    answer = send(gateway.origin, target, headers=headers, body=body)
    assert (answer.status, answer.header("content-type")) == (200, "application/json")
    assert without_token(answer.json()) == without_token(ask(gateway, api, target).json())


@pytest.mark.parametrize("name", ["teable", "teable-without-api", "dreadnode", "paged"])
@pytest.mark.parametrize("parameter", ["account", "org", "%6Frg", "spaceId", "%73%70aceId", "space_id", "space%5fid"])
def test_query_cannot_change_the_account(gateway: Daybook, name: str, parameter: str) -> None:
    """A query parameter with the name of the account's path variable is ignored."""
    api = APIS[name]
    answer = ask(gateway, api, f"{api.path}?{api.good}&{parameter}=spcExampleArchive")
    assert answer.status == 200, answer.body
    assert without_token(answer.json()) == without_token(ask(gateway, api, f"{api.path}?{api.good}").json())
