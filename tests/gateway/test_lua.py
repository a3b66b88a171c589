"""The gateway's Lua scripts, run by the LuaJIT of lupa. tests/facades runs them in Envoy."""

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
    """Envoy's body object."""

    text: bytes

    def length(self) -> int:
        """The length in bytes."""
        return len(self.text)

    def getBytes(self, first: int, count: int) -> bytes:  # Envoy's name
        """`count` bytes, from the offset `first`."""
        return self.text[first : first + count]

    def setBytes(self, text: bytes) -> None:  # Envoy's name
        """Replaces the body."""
        self.text = text


@dataclass(slots=True)
class Headers:
    """Envoy's headers object."""

    values: dict[bytes, bytes]

    def get(self, name: bytes) -> bytes | None:
        """The value of a header, or nil."""
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
    """Envoy's argument of a script's functions."""

    lua: Any
    header_values: dict[str, str]
    text: bytes | None = None
    metadata_values: dict[str, Any] = field(default_factory=dict)
    answered: dict[str, str] = field(default_factory=dict)
    lua_headers: Headers = field(init=False)
    lua_body: Body | None = field(init=False)

    def __post_init__(self) -> None:
        """Encodes the headers, since Lua's strings are bytes."""
        self.lua_headers = Headers({name.encode(): value.encode() for name, value in self.header_values.items()})
        self.lua_body = None if self.text is None else Body(self.text)

    def headers(self) -> Headers:
        """The headers of the request or the answer."""
        return self.lua_headers

    def body(self) -> Body | None:
        """The body, or nil."""
        return self.lua_body

    def metadata(self) -> Any:
        """The metadata of the route."""
        table = self.lua.table_from(_encoded(self.metadata_values), recursive=True)
        return _Metadata(table)

    def respond(self, headers: Any, _body: bytes) -> None:
        """Ends the request with an answer by the script."""
        self.answered = {name.decode(): value.decode() for name, value in headers.items()}

    def header(self, name: str) -> str | None:
        """A header as str, or None."""
        value = self.lua_headers.get(name.encode())
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
    """A Lua runtime that has loaded a script of the gateway."""
    lua = LuaRuntime(encoding=None, unpack_returned_tuples=True, register_eval=False, register_builtins=False)
    # Calls of lupa's Python objects are unreliable in compiled traces.
    lua.execute(b"jit.off()")
    lua.execute(b'BOUND = {["parent"] = true, ["space_id"] = true}')
    lua.execute(f"FREE = {{{', '.join(f'{each} = true' for each in FREE)}}}".encode())
    lua.execute((FOLDER / "lua" / name).read_bytes())
    return lua


def on_request(lua: Any, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> Handle:
    """Runs a script on a request; returns the handle with its changes."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    handle = Handle(lua, {":path": path, ":method": method, **named}, body)
    lua.globals().envoy_on_request(handle)
    return handle


def on_response(lua: Any, status: str, body: bytes | None, metadata: dict[str, Any], **headers: str) -> Handle:
    """Runs a script on an answer; returns the handle with its changes."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    handle = Handle(lua, {":status": status, **named}, body, metadata)
    lua.globals().envoy_on_response(handle)
    return handle


REST = load("rest.lua")
BODY_KEYS = load("body_keys.lua")
ERRORS = {"500": {"status": "500", "body": "broken"}, "503": {"status": "502", "body": "away"}}


@pytest.mark.parametrize(
    ("path", "decoded"),
    [
        ("/v1/accounts?%70arent=a", "/v1/accounts?parent=a"),
        ("/v1/accounts?x=1&space%5Fid=a&space%5fid=b", "/v1/accounts?x=1&space_id=a&space_id=b"),
        # Values and other names stay escaped.
        ("/v1/accounts?x=%70arent&%6Fther=%70", "/v1/accounts?x=%70arent&%6Fther=%70"),
        ("/v1/accounts/%70arent", "/v1/accounts/%70arent"),
    ],
)
def test_escaped_names_of_path_variables_are_decoded(path: str, decoded: str) -> None:
    """Escaped query names of path variables are decoded, since the transcoder ignores only unescaped ones."""
    assert on_request(REST, path).header(":path") == decoded


def test_body_of_a_get_is_dropped() -> None:
    """The body and the content-length of a GET are removed; those of other methods stay."""
    read = on_request(REST, "/v1/accounts", body=b"{}", content_length="2")
    assert (read.lua_body, read.header("content-length")) == (Body(b""), None)
    written = on_request(REST, "/v1/accounts", "POST", b"{}", content_length="2")
    assert (written.lua_body, written.header("content-length")) == (Body(b"{}"), "2")


@pytest.mark.parametrize(("sent", "expected"), [("application/grpc", None), ("application/json", "application/json")])
def test_grpc_content_type_is_removed(sent: str, expected: str | None) -> None:
    """gRPC's content type is removed, since the transcoder would pass such a request on unchanged."""
    assert on_request(REST, "/v1/accounts", "POST", content_type=sent).header("content-type") == expected


def test_unbound_method_gets_405() -> None:
    """A method that is not in the route's `allow` gets 405 with `allow`."""
    handle = Handle(REST, {":path": "/v1/accounts", ":method": "PUT"}, None, {"allow": "GET, POST"})
    REST.globals().envoy_on_request(handle)
    assert handle.answered == {":status": "405", "allow": "GET, POST"}


@pytest.mark.parametrize(
    ("status", "text", "headers", "metadata", "shown"),
    [
        # The server's error body, with and without a status.
        ("400", b"status", {"x_error_body": "finished", "x_error_status": "422"}, {}, ("422", b"finished")),
        ("400", b"status", {"x_error_body": "finished"}, {}, ("400", b"finished")),
        # A gRPC error gets the vendor's body for its status, or else for 500.
        ("503", b'{"code":14,"message":"away"}', {}, {"errors": ERRORS}, ("502", b"away")),
        ("429", b'{"code":8,"message":"large"}', {}, {"errors": ERRORS}, ("500", b"broken")),
        ("503", b"", {}, {"errors": ERRORS}, ("502", b"away")),
        # A refusal by the gateway, and a native error, stay unchanged.
        ("404", b'{"detail":"Not found"}', {}, {"errors": ERRORS}, ("404", b'{"detail":"Not found"}')),
        ("503", b'{"code":14,"message":"away"}', {}, {}, ("503", b'{"code":14,"message":"away"}')),
    ],
)
def test_error_has_the_vendors_body(
    status: str, text: bytes, headers: dict[str, str], metadata: dict[str, Any], shown: tuple[str, bytes]
) -> None:
    """The vendor's error body replaces the google.rpc.Status that the transcoder printed."""
    handle = on_response(REST, status, text, metadata, **headers)
    assert handle.lua_body is not None
    assert (handle.header(":status"), handle.lua_body.text) == shown


@pytest.mark.parametrize(
    ("status", "text", "shown"),
    [
        ("200", b'{"transactions":[{"id":1},{"id":2}]}', b'[{"id":1},{"id":2}]'),
        ("200", b'{"transactions":[]}', b"[]"),
        ("200", b"", b""),
        # An error stays an object.
        ("404", b'{"detail":"Not found"}', b'{"detail":"Not found"}'),
    ],
)
def test_array_field_replaces_the_answer(status: str, text: bytes, shown: bytes) -> None:
    """The value of the field that the route names as `array` replaces a 200 answer."""
    handle = on_response(REST, status, text, {"array": "transactions"})
    assert handle.lua_body == Body(shown)


def test_401_has_a_challenge() -> None:
    """A 401 keeps its www-authenticate, or gets the route's challenge, or else Bearer."""
    assert on_response(REST, "401", b"", {"challenge": "Basic"}).header("www-authenticate") == "Basic"
    assert on_response(REST, "401", b"", {}).header("www-authenticate") == "Bearer"
    assert on_response(REST, "401", b"", {}, www_authenticate="x").header("www-authenticate") == "x"
    assert on_response(REST, "200", b"", {}).header("www-authenticate") is None


def test_refusal_of_head_has_no_content_length() -> None:
    """The content-length of a refused HEAD is removed, since the vendor's body has another length."""
    assert on_response(REST, "404", None, {}, content_length="9").header("content-length") is None


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=20,
)


def paths_of(value: Any, prefix: str = "") -> Iterator[str]:
    """The path of each key, without those within free fields."""
    if isinstance(value, list):
        for each in value:
            yield from paths_of(each, prefix)
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield prefix + name
            if name not in FREE:
                yield from paths_of(inner, f"{prefix}{name}.")


@given(body=st.dictionaries(NAMES, JSON_VALUES, max_size=5), indent=st.none() | st.integers(0, 2))
def test_keys_of_a_body_are_listed(body: dict[str, Any], indent: int | None) -> None:
    """The header lists each key of a JSON body once, in any layout."""
    handle = on_request(BODY_KEYS, "/v1/accounts", "POST", json.dumps(body, indent=indent).encode())
    listed = handle.header("x-daybook-body-keys")
    assert sorted((listed or "").split(",")) == sorted(set(paths_of(body)) or {""})
    assert handle.header("x-daybook-body-repeated") is None
    assert handle.header("x-daybook-body-malformed") is None


@pytest.mark.parametrize(
    "text", ["{a: 1}", "{'a': 1}", '{"a": 1,}', '{"a": 1} x', '{"a" 1}', "[1", "[" * 66 + "]" * 66]
)
def test_invalid_json_is_marked_malformed(text: str) -> None:
    """JSON that is invalid but accepted by Envoy's transcoder, or nested too deeply, is marked as malformed."""
    assert on_request(BODY_KEYS, "/v1/accounts", "POST", text.encode()).header("x-daybook-body-malformed") == "1"


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
def test_repeated_key_is_named(text: str, repeated: str | None) -> None:
    """A key repeated within one object, in camelCase or snake_case, is named in a header."""
    assert on_request(BODY_KEYS, "/v1/accounts", "POST", text.encode()).header("x-daybook-body-repeated") == repeated


def test_list_of_keys_is_bounded() -> None:
    """The header is cut at 4096 bytes: a longer list has an unknown key, which the server finds."""
    body = json.dumps({f"key{number}": 1 for number in range(10_000)}).encode()
    listed = on_request(BODY_KEYS, "/v1/accounts", "POST", body).header("x-daybook-body-keys")
    assert listed is not None
    assert 4000 < len(listed) <= 4096


@pytest.mark.parametrize(("path", "method"), [("/api/space/x", "POST"), ("/v1/accounts", "GET")])
def test_only_native_bodies_are_parsed(path: str, method: str) -> None:
    """Bodies of facades, which ignore unknown keys, and of GETs are not parsed."""
    assert on_request(BODY_KEYS, path, method, b"{").header("x-daybook-body-malformed") is None
