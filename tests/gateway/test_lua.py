"""The gateway's Lua, run by the LuaJIT of the lupa wheel; Envoy itself runs it in tests/facades."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lupa.luajit21 import LuaRuntime

from server.gateway.configuration import FOLDER

FREE = ("labels", "metadata")
NAMES = st.text(alphabet="abcdefgh", min_size=1, max_size=3) | st.sampled_from(FREE)


@dataclass(slots=True)
class Body:
    """What Envoy gives as a body."""

    text: bytes

    def length(self) -> int:
        """In bytes."""
        return len(self.text)

    def getBytes(self, first: int, count: int) -> bytes:  # Envoy's name
        """A part of it."""
        return self.text[first : first + count]

    def setBytes(self, text: bytes) -> None:  # Envoy's name
        """Replaces it."""
        self.text = text


@dataclass(slots=True)
class Headers:
    """What Envoy gives as headers."""

    values: dict[bytes, bytes]

    def get(self, name: bytes) -> bytes | None:
        """The value, or nil."""
        return self.values.get(name)

    def replace(self, name: bytes, value: bytes) -> None:
        """Sets a header."""
        self.values[name] = value

    add = replace

    def remove(self, name: bytes) -> None:
        """Removes a header."""
        self.values.pop(name, None)


@dataclass(slots=True)
class Handle:
    """What Envoy calls the functions of a script with."""

    lua: Any
    header_values: dict[str, str]
    text: bytes | None = None
    metadata_values: dict[str, Any] = field(default_factory=dict)
    answered: dict[str, str] = field(default_factory=dict)
    held: Headers = field(init=False)
    held_body: Body | None = field(init=False)

    def __post_init__(self) -> None:
        """Envoy's strings are bytes."""
        self.held = Headers({name.encode(): value.encode() for name, value in self.header_values.items()})
        self.held_body = None if self.text is None else Body(self.text)

    def headers(self) -> Headers:
        """The headers of the request or the answer."""
        return self.held

    def body(self) -> Body | None:
        """The body, or nil."""
        return self.held_body

    def metadata(self) -> Any:
        """The metadata of the route."""
        table = self.lua.table_from(_encoded(self.metadata_values), recursive=True)
        return _Metadata(table)

    def respond(self, headers: Any, _body: bytes) -> None:
        """Ends the request with an answer of the script."""
        self.answered = {name.decode(): value.decode() for name, value in headers.items()}

    def header(self, name: str) -> str | None:
        """A header as a text."""
        value = self.held.get(name.encode())
        return None if value is None else value.decode()


@dataclass(frozen=True, slots=True)
class _Metadata:
    table: Any

    def get(self, name: bytes) -> Any:
        """A value of the table, or nil."""
        return self.table[name]


def _encoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key.encode(): _encoded(each) for key, each in value.items()}
    return value.encode() if isinstance(value, str) else value


def load(name: str) -> Any:
    """A runtime in which a script of the gateway has been run."""
    lua = LuaRuntime(encoding=None, unpack_returned_tuples=True, register_eval=False, register_builtins=False)
    lua.execute(b'BOUND = {["parent"] = true, ["space_id"] = true}')
    lua.execute(f"FREE = {{{', '.join(f'{each} = true' for each in FREE)}}}".encode())
    lua.execute((FOLDER / "lua" / name).read_bytes())
    return lua


def ask(lua: Any, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> Handle:
    """What a script makes of a request."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    handle = Handle(lua, {":path": path, ":method": method, **named}, body)
    lua.globals().envoy_on_request(handle)
    return handle


def answered(lua: Any, status: str, body: bytes | None, metadata: dict[str, Any], **headers: str) -> Handle:
    """What a script makes of an answer."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    handle = Handle(lua, {":status": status, **named}, body, metadata)
    lua.globals().envoy_on_response(handle)
    return handle


REST = load("rest.lua")
BODY_KEYS = load("body_keys.lua")
ERRORS = {"500": {"status": "500", "body": "broken"}, "503": {"status": "502", "body": "away"}}


@pytest.mark.parametrize(
    ("path", "seen"),
    [
        ("/v1/accounts?%70arent=a", "/v1/accounts?parent=a"),
        ("/v1/accounts?x=1&space%5Fid=a&space%5fid=b", "/v1/accounts?x=1&space_id=a&space_id=b"),
        # A value stays as it is, and so does the name of anything else.
        ("/v1/accounts?x=%70arent&%6Fther=%70", "/v1/accounts?x=%70arent&%6Fther=%70"),
        ("/v1/accounts/%70arent", "/v1/accounts/%70arent"),
    ],
)
def test_names_that_a_path_binds_are_spelled_out(path: str, seen: str) -> None:
    """The transcoder recognises them in a query only without escapes."""
    assert ask(REST, path).header(":path") == seen


def test_body_of_a_get_is_dropped() -> None:
    """With its length; that of another method stays."""
    read = ask(REST, "/v1/accounts", body=b"{}", content_length="2")
    assert (read.held_body, read.header("content-length")) == (Body(b""), None)
    written = ask(REST, "/v1/accounts", "POST", b"{}", content_length="2")
    assert (written.held_body, written.header("content-length")) == (Body(b"{}"), "2")


@pytest.mark.parametrize(("claimed", "kept"), [("application/grpc", None), ("application/json", "application/json")])
def test_rest_is_never_taken_for_grpc(claimed: str, kept: str | None) -> None:
    """The transcoder would pass it on as it is."""
    assert ask(REST, "/v1/accounts", "POST", content_type=claimed).header("content-type") == kept


def test_method_that_a_path_lacks_is_refused() -> None:
    """With what is allowed, as the route says."""
    handle = Handle(REST, {":path": "/v1/accounts", ":method": "PUT"}, None, {"allow": "GET, POST"})
    REST.globals().envoy_on_request(handle)
    assert handle.answered == {":status": "405", "allow": "GET, POST"}


@pytest.mark.parametrize(
    ("status", "text", "headers", "metadata", "shown"),
    [
        # The server's own words, with and without a status.
        ("400", b"status", {"x_error_body": "finished", "x_error_status": "422"}, {}, ("422", b"finished")),
        ("400", b"status", {"x_error_body": "finished"}, {}, ("400", b"finished")),
        # What gRPC refused: the vendor's words, and those for 500 where it has none.
        ("503", b'{"code":14,"message":"away"}', {}, {"errors": ERRORS}, ("502", b"away")),
        ("429", b'{"code":8,"message":"large"}', {}, {"errors": ERRORS}, ("500", b"broken")),
        ("503", b"", {}, {"errors": ERRORS}, ("502", b"away")),
        # What the gateway refused is finished, and the native API has no other words.
        ("404", b'{"detail":"Not found"}', {}, {"errors": ERRORS}, ("404", b'{"detail":"Not found"}')),
        ("503", b'{"code":14,"message":"away"}', {}, {}, ("503", b'{"code":14,"message":"away"}')),
    ],
)
def test_error_is_in_the_words_of_its_vendor(
    status: str, text: bytes, headers: dict[str, str], metadata: dict[str, Any], shown: tuple[str, bytes]
) -> None:
    """The finished body takes the place of the status that the transcoder printed."""
    handle = answered(REST, status, text, metadata, **headers)
    assert handle.held_body is not None
    assert (handle.header(":status"), handle.held_body.text) == shown


@pytest.mark.parametrize(
    ("status", "text", "shown"),
    [
        ("200", b'{"transactions":[{"id":1},{"id":2}]}', b'[{"id":1},{"id":2}]'),
        ("200", b'{"transactions":[]}', b"[]"),
        ("200", b"", b""),
        # An error is no array.
        ("404", b'{"detail":"Not found"}', b'{"detail":"Not found"}'),
    ],
)
def test_array_is_all_of_an_answer(status: str, text: bytes, shown: bytes) -> None:
    """Where the route names the field that holds it."""
    handle = answered(REST, status, text, {"array": "transactions"})
    assert handle.held_body == Body(shown)


def test_challenge_goes_with_401() -> None:
    """The vendor's own, else Bearer; and one that is there stays."""
    assert answered(REST, "401", b"", {"challenge": "Basic"}).header("www-authenticate") == "Basic"
    assert answered(REST, "401", b"", {}).header("www-authenticate") == "Bearer"
    assert answered(REST, "401", b"", {}, www_authenticate="x").header("www-authenticate") == "x"
    assert answered(REST, "200", b"", {}).header("www-authenticate") is None


def test_refusal_of_head_has_no_length() -> None:
    """Its body was left out, and would have been changed."""
    assert answered(REST, "404", None, {}, content_length="9").header("content-length") is None


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=20,
)


def paths_of(value: Any, before: str = "") -> Iterator[str]:
    """The path of each key, but for those inside of free fields."""
    if isinstance(value, list):
        for each in value:
            yield from paths_of(each, before)
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield before + name
            if name not in FREE:
                yield from paths_of(inner, f"{before}{name}.")


@given(body=st.dictionaries(NAMES, JSON_VALUES, max_size=5), indent=st.none() | st.integers(0, 2))
def test_keys_of_a_body_are_told(body: dict[str, Any], indent: int | None) -> None:
    """Each once, whatever JSON they are in and however it is written."""
    handle = ask(BODY_KEYS, "/v1/accounts", "POST", json.dumps(body, indent=indent).encode())
    told = handle.header("x-daybook-body-keys")
    assert sorted((told or "").split(",")) == sorted(set(paths_of(body)) or {""})
    assert handle.header("x-daybook-body-repeated") is None
    assert handle.header("x-daybook-body-malformed") is None


@pytest.mark.parametrize(
    "text", ["{a: 1}", "{'a': 1}", '{"a": 1,}', '{"a": 1} x', '{"a" 1}', "[1", "[" * 66 + "]" * 66]
)
def test_json_of_a_kind_is_refused(text: str) -> None:
    """What Envoy's transcoder takes and JSON doesn't, and what is nested too deeply."""
    assert ask(BODY_KEYS, "/v1/accounts", "POST", text.encode()).header("x-daybook-body-malformed") == "1"


@pytest.mark.parametrize(
    ("text", "repeated"),
    [
        ('{"a": 1, "a": 2}', "a"),
        ('{"orderBy": 1, "order_by": 2}', "order_by"),
        ('{"a": [{"b": 1, "b": 2}]}', "a.b"),
        ('{"a": [{"b": 1}, {"b": 2}]}', None),
        ('{"labels": {"b": 1, "b": 2}}', None),
    ],
)
def test_key_that_comes_twice_is_told(text: str, repeated: str | None) -> None:
    """In one object, in either spelling."""
    assert ask(BODY_KEYS, "/v1/accounts", "POST", text.encode()).header("x-daybook-body-repeated") == repeated


def test_keys_are_bounded() -> None:
    """A body with more of them is no JSON of ours; the server finds one that it doesn't know."""
    body = json.dumps({f"key{number}": 1 for number in range(10_000)}).encode()
    told = ask(BODY_KEYS, "/v1/accounts", "POST", body).header("x-daybook-body-keys")
    assert told is not None
    assert 4000 < len(told) <= 4096


@pytest.mark.parametrize(("path", "method"), [("/api/space/x", "POST"), ("/v1/accounts", "GET")])
def test_only_bodies_of_the_native_api_are_read(path: str, method: str) -> None:
    """A vendor ignores keys that it doesn't know, and the body of a GET means nothing."""
    assert ask(BODY_KEYS, path, method, b"{").header("x-daybook-body-malformed") is None
