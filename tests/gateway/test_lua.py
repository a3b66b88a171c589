"""The gateway's Lua scripts, run by the LuaJIT of lupa. tests/facades runs them in Envoy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lupa.luajit21 import LuaRuntime

from server.gateway.configuration import FOLDER

FREE = ("labels", "metadata")
NAMES = st.text(alphabet="abcdefgh", min_size=1, max_size=3) | st.sampled_from(FREE)


ENVOY = b"""
local function new_headers(values)
  local headers = {values = values}
  function headers:get(name) return self.values[name] end
  function headers:replace(name, value) self.values[name] = value end
  headers.add = headers.replace
  function headers:remove(name) self.values[name] = nil end
  return headers
end

local function new_body(text)
  local body = {text = text}
  function body:length() return #self.text end
  function body:getBytes(first, count) return self.text:sub(first + 1, first + count) end
  function body:setBytes(changed) self.text = changed end
  return body
end

function new_handle(headers, text, metadata)
  local handle = {of_headers = new_headers(headers), of_body = text and new_body(text)}
  function handle:headers() return self.of_headers end
  function handle:body() return self.of_body end
  function handle:metadata() return {get = function(_, name) return metadata[name] end} end
  function handle:respond(answer) self.answer = answer end
  return handle
end
"""
"""Envoy's argument of a script's functions, in Lua: calls from Lua to objects of Python are unreliable in lupa."""


class Handle:
    """Envoy's argument of a script's functions, seen from Python."""

    def __init__(
        self, lua: Any, headers: dict[str, str], text: bytes | None = None, metadata: dict[str, Any] | None = None
    ) -> None:
        """A request or answer with these headers and this body, on a route with this metadata."""
        tables = [lua.table_from(_encoded(each), recursive=True) for each in (headers, metadata or {})]
        self.argument = lua.globals().new_handle(tables[0], text, tables[1])

    def header(self, name: str) -> str | None:
        """The value of a header, or None."""
        value = self.argument.of_headers[b"values"][name.encode()]
        return None if value is None else value.decode()

    @property
    def text(self) -> bytes | None:
        """The body, or None."""
        body = self.argument.of_body
        return body.text if body else None

    @property
    def answer(self) -> dict[str, str]:
        """The headers of the script's own answer."""
        return {name.decode(): value.decode() for name, value in self.argument.answer.items()}


def _encoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key.encode(): _encoded(each) for key, each in value.items()}
    return value.encode() if isinstance(value, str) else value


def load(name: str) -> Any:
    """A Lua runtime that has loaded a script of the gateway."""
    lua = LuaRuntime(encoding=None, register_eval=False, register_builtins=False)
    lua.execute(ENVOY)
    lua.execute(b'BOUND = {["parent"] = true, ["space_id"] = true}')
    lua.execute(f"FREE = {{{', '.join(f'{each} = true' for each in FREE)}}}".encode())
    lua.execute((FOLDER / "lua" / name).read_bytes())
    return lua


def on_request(lua: Any, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> Handle:
    """Runs a script on a request; returns the handle with its changes."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    handle = Handle(lua, {":path": path, ":method": method, **named}, body)
    lua.globals().envoy_on_request(handle.argument)
    return handle


def on_response(lua: Any, status: str, body: bytes | None, metadata: dict[str, Any], **headers: str) -> Handle:
    """Runs a script on an answer; returns the handle with its changes."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    handle = Handle(lua, {":status": status, **named}, body, metadata)
    lua.globals().envoy_on_response(handle.argument)
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
    assert (read.text, read.header("content-length")) == (b"", None)
    written = on_request(REST, "/v1/accounts", "POST", b"{}", content_length="2")
    assert (written.text, written.header("content-length")) == (b"{}", "2")


@pytest.mark.parametrize(("sent", "expected"), [("application/grpc", None), ("application/json", "application/json")])
def test_grpc_content_type_is_removed(sent: str, expected: str | None) -> None:
    """gRPC's content type is removed, since the transcoder would pass such a request on unchanged."""
    assert on_request(REST, "/v1/accounts", "POST", content_type=sent).header("content-type") == expected


def test_unbound_method_gets_405() -> None:
    """A method that is not in the route's `allow` gets 405 with `allow`."""
    handle = Handle(REST, {":path": "/v1/accounts", ":method": "PUT"}, None, {"allow": "GET, POST"})
    REST.globals().envoy_on_request(handle.argument)
    assert handle.answer == {":status": "405", "allow": "GET, POST"}


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
    assert (handle.header(":status"), handle.text) == shown


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
    assert on_response(REST, status, text, {"array": "transactions"}).text == shown


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
