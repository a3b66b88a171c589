"""Internal headers: the gateway removes them from every request, and from every REST answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from tests.support.gateways import gateway_before
from tests.support.http_client import problems_of_any_answer, send
from tests.support.vendors import PATHS

FORGED = "forged.example"
"""A part of each forged value, and of no other."""
NAMES = (
    "x-envoy-original-path",
    "x-envoy-original-method",
    "x-envoy-upstream-rq-timeout-ms",
    "x-envoy-expected-rq-timeout-ms",
    "x-envoy-max-retries",
    "x-envoy-retry-on",
    "x-envoy-internal",
    "x-envoy-external-address",
    "x-envoy-decorator-operation",
    "x-envoy-anything",
    "x-error-body",
    "x-error-status",
    "x-error-anything",
    "x-daybook-origin",
    "x-daybook-anything",
)
SPELLINGS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "in capitals": str.upper,
    "as titles": str.title,
    "with underscores": lambda name: name.replace("-", "_"),
    "with underscores, as titles": lambda name: name.replace("-", "_").title(),
    "with one underscore": lambda name: name.replace("-", "_", 1),
    "with the other underscore": lambda name: name[::-1].replace("-", "_", 1)[::-1],
}
LEAKS = tuple((name, "1") for name in ("x-envoy-anything", "x-envoy-upstream-service-time", "x-error-anything"))
TARGETS = PATHS | {"native": "/v1/accounts/example"}


class Upstream(grpc.GenericRpcHandler):
    """A server that records the headers of each call, and answers with internal headers."""

    def __init__(self) -> None:
        self.code = grpc.StatusCode.OK
        self.seen: list[dict[str, str]] = []

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        """Answers every method with an empty message, or with the status `code`."""
        is_check = handler_call_details.method.startswith("/grpc.health")

        def answer(_request: bytes, context: grpc.ServicerContext) -> bytes:
            if is_check:
                context.abort(grpc.StatusCode.UNIMPLEMENTED, "")
            self.seen.append({name: str(value) for name, value in context.invocation_metadata()})
            context.set_trailing_metadata(LEAKS)
            if self.code is not grpc.StatusCode.OK:
                context.abort(self.code, "")
            context.send_initial_metadata(LEAKS)
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.fixture(scope="module")
def upstream_and_origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Upstream, str]]:
    """A recording server, and the origin of a gateway in front of it."""
    upstream, server = Upstream(), grpc.server(ThreadPoolExecutor())
    server.add_generic_rpc_handlers((upstream,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with gateway_before(tmp_path_factory.mktemp("headers"), port) as origin:
        yield upstream, origin
    server.stop(None).wait()


def require_nothing_forged(seen: dict[str, str]) -> None:
    """Fails if a forged value, or an internal header in any spelling, is among the headers."""
    forged = {name: value for name, value in seen.items() if FORGED in value}
    assert not forged
    assert not [name for name in seen if name.replace("_", "-").startswith("x-error-")]
    assert {name for name in seen if name.replace("_", "-").startswith("x-daybook-")} <= {"x-daybook-origin"}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", TARGETS)
def test_rest_caller_cannot_set_internal_headers(
    upstream_and_origin: tuple[Upstream, str], name: str, spelling: str
) -> None:
    """The gateway removes internal headers from a REST request in every spelling."""
    upstream, origin = upstream_and_origin
    upstream.code = grpc.StatusCode.OK
    upstream.seen.clear()
    headers = {SPELLINGS[spelling](each): f"https://{FORGED}" for each in NAMES}
    answer = send(origin, TARGETS[name], headers={"x-other": "kept", **headers})
    assert answer.status == 200
    (seen,) = upstream.seen
    assert seen["x-other"] == "kept"
    require_nothing_forged(seen)
    # The gateway itself sets this one, for the links of Paged.
    assert seen.get("x-daybook-origin") == (origin if name == "paged" else None)


@pytest.mark.parametrize("name", ["grpc-timeout", "grpc-encoding", "grpc-accept-encoding"])
def test_grpc_headers_of_a_rest_call_are_ignored(upstream_and_origin: tuple[Upstream, str], name: str) -> None:
    """A gRPC header in a REST request does not affect the gateway's call."""
    upstream, origin = upstream_and_origin
    upstream.code = grpc.StatusCode.OK
    answer = send(origin, TARGETS["native"], headers={name: "1n" if name == "grpc-timeout" else "unknown"})
    assert answer.status == 200


@pytest.mark.parametrize("spelling", ["as it is", "with underscores", "with the other underscore"])
def test_grpc_caller_cannot_set_internal_headers(upstream_and_origin: tuple[Upstream, str], spelling: str) -> None:
    """The gateway removes internal headers from a gRPC call. HTTP/2 has no upper-case names."""
    upstream, origin = upstream_and_origin
    upstream.code = grpc.StatusCode.OK
    upstream.seen.clear()
    metadata = tuple((SPELLINGS[spelling](each), f"https://{FORGED}") for each in NAMES)
    with grpc.insecure_channel(origin.removeprefix("http://")) as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/daybook.v1.Ledger/GetAccount")
        assert call(b"", metadata=(("x-other", "kept"), *metadata), timeout=60) == b""
    (seen,) = upstream.seen
    assert seen["x-other"] == "kept"
    require_nothing_forged(seen)
    assert "x-daybook-origin" not in seen


def test_grpc_caller_keeps_binary_metadata(upstream_and_origin: tuple[Upstream, str]) -> None:
    """Binary metadata of a gRPC call reaches the server."""
    upstream, origin = upstream_and_origin
    upstream.code = grpc.StatusCode.OK
    upstream.seen.clear()
    metadata = (("x-trace-bin", bytes(range(256))), ("x-own-bin", b""), ("x.dotted_name", "kept"))
    with grpc.insecure_channel(origin.removeprefix("http://")) as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/daybook.v1.Ledger/GetAccount")
        assert call(b"", metadata=metadata, timeout=60) == b""
    (seen,) = upstream.seen
    assert {name: seen[name] for name, _ in metadata} == {name: str(value) for name, value in metadata}


@pytest.mark.parametrize("name", TARGETS)
def test_binary_metadata_of_a_rest_call_is_removed(upstream_and_origin: tuple[Upstream, str], name: str) -> None:
    """The gateway removes headers that only gRPC may have from a REST request, and keeps all others."""
    upstream, origin = upstream_and_origin
    upstream.code = grpc.StatusCode.OK
    upstream.seen.clear()
    odd = {"grpc-trace-bin": "AAAA", "x-own-bin": "AAAA", "grpc-previous-rpc-attempts": "1", "x~y": "1"}
    answer = send(origin, TARGETS[name], headers={**odd, "x-bin-other": "kept", "x.dotted_name": "kept"})
    assert answer.status == 200
    (seen,) = upstream.seen
    assert not seen.keys() & odd.keys()
    assert (seen["x-bin-other"], seen["x.dotted_name"]) == ("kept", "kept")


@pytest.mark.parametrize("code", [grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INTERNAL])
@pytest.mark.parametrize("name", TARGETS)
def test_internal_headers_are_removed_from_rest_answers(
    upstream_and_origin: tuple[Upstream, str], name: str, code: grpc.StatusCode
) -> None:
    """The gateway removes internal and gRPC headers and trailers from REST answers."""
    upstream, origin = upstream_and_origin
    upstream.code = code
    for method in ("GET", "HEAD"):
        answer = send(origin, TARGETS[name], method=method)
        assert (answer.status == 200) == (code is grpc.StatusCode.OK)
        assert not list(problems_of_any_answer(answer))
        assert not [each for each, _ in answer.headers if each.startswith(("grpc-", "x-envoy-", "x-error-"))]
