"""Errors: each leaf class has a reason of the contract, a status and its details."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import grpc
import pytest
from daybook.v1.error_reason_pb2 import ErrorReason
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo

from server.ledger import errors
from server.ledger.errors import DaybookError, InvalidArgument
from server.transport.errors import code_of, http_status_of, to_status
from tests.support.errors import CLASSES, LEAVES, make

REASONS = ErrorReason.keys()[1:]
ROOT = Path(__file__).resolve().parents[2]

# The mapping of google/rpc/code.proto.
STATUSES = {
    "InvalidArgument": (grpc.StatusCode.INVALID_ARGUMENT, 400),
    "Unauthenticated": (grpc.StatusCode.UNAUTHENTICATED, 401),
    "PermissionDenied": (grpc.StatusCode.PERMISSION_DENIED, 403),
    "NotFound": (grpc.StatusCode.NOT_FOUND, 404),
    "AlreadyExists": (grpc.StatusCode.ALREADY_EXISTS, 409),
    "FailedPrecondition": (grpc.StatusCode.FAILED_PRECONDITION, 400),
    "Aborted": (grpc.StatusCode.ABORTED, 409),
    "ResourceExhausted": (grpc.StatusCode.RESOURCE_EXHAUSTED, 429),
    "DeadlineExceeded": (grpc.StatusCode.DEADLINE_EXCEEDED, 504),
    "Unimplemented": (grpc.StatusCode.UNIMPLEMENTED, 501),
    "Unavailable": (grpc.StatusCode.UNAVAILABLE, 503),
    "Internal": (grpc.StatusCode.INTERNAL, 500),
}


def by_name(leaf: type[DaybookError]) -> str:
    """The id of a case."""
    return leaf.__name__


def status_class(leaf: type[DaybookError]) -> type[DaybookError]:
    """The class right below DaybookError that a leaf belongs to."""
    return leaf.__mro__[leaf.__mro__.index(DaybookError) - 1]


def test_reasons_and_leaves_are_one_to_one() -> None:
    """The reasons of the contract are exactly those of the leaves and of the gateway, and no two leaves share one."""
    of_leaves = [leaf.reason for leaf in LEAVES]
    of_gateway = set(re.findall(r'"reason": "([A-Z_]+)"', (ROOT / "envoy.yaml").read_text()))
    assert sorted([*of_leaves, *of_gateway.difference(of_leaves)]) == sorted(REASONS)


@pytest.mark.parametrize("leaf", LEAVES, ids=by_name)
def test_a_reason_is_the_name_of_its_class(leaf: type[DaybookError]) -> None:
    """The reason of a class is its name in upper snake case."""
    assert re.sub(r"(?<!^)(?=[A-Z])", "_", leaf.__name__).upper() == leaf.reason


def test_the_tree_of_the_docstring_is_complete() -> None:
    """The tree in the module's docstring has exactly the classes of the module, each below its status."""
    tree = re.sub(r",\n *│ +", ", ", errors.__doc__ or "")
    drawn = {match[1]: match[2].split(", ") for match in re.finditer(r"[├└]── (\w+) +(\w.*)$", tree, re.MULTILINE)}
    real: dict[str, list[str]] = {}
    for leaf in LEAVES:
        real.setdefault(status_class(leaf).__name__, []).append(leaf.__name__)
    assert {name: sorted(leaves) for name, leaves in drawn.items()} == {
        name: sorted(leaves) for name, leaves in real.items()
    }


def test_only_leaves_have_a_reason() -> None:
    """A class above the leaves has no reason, so it can't be raised by mistake."""
    assert [each.__name__ for each in CLASSES if each not in LEAVES and hasattr(each, "reason")] == []


@pytest.mark.parametrize("leaf", LEAVES, ids=by_name)
def test_every_error_has_its_status(leaf: type[DaybookError]) -> None:
    """The gRPC and the HTTP status of an error are those of google.rpc.Code for its class."""
    code, http_status = STATUSES[status_class(leaf).__name__]
    error = make(leaf)
    assert code_of(error) is code
    assert http_status_of(error) == http_status
    assert to_status(error).code == code.value[0]


@pytest.mark.parametrize("leaf", LEAVES, ids=by_name)
def test_every_error_carries_one_error_info(leaf: type[DaybookError]) -> None:
    """A status carries exactly one ErrorInfo with the domain, the reason and the metadata of its error."""
    error = make(leaf)
    infos = []
    for detail in to_status(error).details:
        info = ErrorInfo()
        if detail.Unpack(info):
            infos.append(info)
    assert [(info.domain, info.reason, dict(info.metadata)) for info in infos] == [
        ("daybook", leaf.reason, error.metadata)
    ]


VERB = re.compile(r"\b(is|was|are|has|had|lacks|carries|would|belongs|exists|failed|makes|takes|took)\b")


@pytest.mark.parametrize(
    "leaf", [each for each in LEAVES if "problem" not in inspect.signature(each).parameters], ids=by_name
)
def test_message_is_a_sentence(leaf: type[DaybookError]) -> None:
    """The part of a message before a semicolon has a verb."""
    assert VERB.search(make(leaf).message.partition(";")[0])


@pytest.mark.parametrize("leaf", LEAVES, ids=by_name)
def test_only_a_wrong_field_is_a_bad_request(leaf: type[DaybookError]) -> None:
    """A status carries a BadRequest that names the field exactly when the argument is invalid."""
    error = make(leaf)
    violations: list[tuple[str, str]] = []
    for detail in to_status(error).details:
        bad_request = BadRequest()
        if detail.Unpack(bad_request):
            violations += [(each.field, each.description) for each in bad_request.field_violations]
    if isinstance(error, InvalidArgument):
        assert violations == [(error.field, error.problem)]
        assert error.metadata == {"field": "field"}
    else:
        assert violations == []


def test_temporary_errors_have_a_retry_delay() -> None:
    """TooBusy, RateLimited and ClockSkewed carry a RetryInfo with their delay, and no other error has one."""
    delays = {}
    for leaf in LEAVES:
        for detail in to_status(make(leaf)).details:
            retry = RetryInfo()
            if detail.Unpack(retry):
                delays[leaf] = retry.retry_delay.ToTimedelta().total_seconds()
    assert delays == {errors.TooBusy: 1.0, errors.RateLimited: 1.5, errors.ClockSkewed: 5.0}


@pytest.mark.parametrize(("seconds", "delay"), [(2.5, 2.5), (0.001, 0.001), (0.000_000_001, 0.001), (1.000_1, 1.001)])
def test_a_retry_delay_is_rounded_up(seconds: float, delay: float) -> None:
    """The delay of RetryInfo is rounded up to milliseconds, so that a retry is never too early."""
    retry = RetryInfo()
    assert to_status(errors.RateLimited(seconds)).details[1].Unpack(retry)
    assert retry.retry_delay.ToTimedelta().total_seconds() == delay


@pytest.mark.parametrize("leaf", LEAVES, ids=by_name)
def test_every_message_has_its_metadata(leaf: type[DaybookError]) -> None:
    """An error's message is also that of its status, and it contains every value of the metadata."""
    error = make(leaf)
    assert error.message
    assert str(error) == error.message == to_status(error).message
    for value in error.metadata.values():
        assert value in error.message
