"""Rules of the project: linters, layers, contracts, generated files, and lists that must agree."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from daybook.v1 import admin_service_pb2, ledger_service_pb2
from daybook.v1.error_reason_pb2 import ErrorReason
from google.api.annotations_pb2 import http
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.struct_pb2 import Struct

from protos import generate
from server.app import FACADES, SERVICES
from server.demo import guide
from server.gateway.configuration import committed, render
from server.gateway.contracts import read_contracts
from server.vendors import all_vendors
from tests.support.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
ERROR_REASONS = ErrorReason.keys()[1:]


def run(*command: str) -> None:
    """Runs a tool, and fails with its output if it finds a problem."""
    result = subprocess.run(
        [str(BIN / command[0]), *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        pytest.param(("mypy",), marks=pytest.mark.long),
        ("lint-imports",),
    ],
    ids=lambda command: "-".join(command[:2]),
)
def test_tool_finds_no_problem(command: tuple[str, ...]) -> None:
    """Linter, formatter, type checker and import linter find no problem."""
    run(*command)


def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    """The committed files in gen/ equal the code generated from the contracts."""
    generate.generate(tmp_path / "gen")
    fresh, committed = files_under(tmp_path / "gen"), files_under(ROOT / "gen")
    assert fresh.keys() == committed.keys()
    stale = [name for name in fresh if fresh[name] != committed[name]]
    assert not stale, "run `make gen`"
    assert files_under(generate.GOOGLE_PROTOS) == generate.google_types(), "run `make gen`"


def files_under(folder: Path) -> dict[str, bytes]:
    """Returns the content of every file in a folder, by its relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.parametrize("folder", [generate.PROTOS, generate.INTERNAL_PROTOS], ids=["contracts", "internal"])
def test_contracts_build_and_pass_buf_lint(folder: Path) -> None:
    """Each folder is a buf module that builds and follows the rules of its buf.yaml."""
    for command in (("build", str(folder), "--output", os.devnull), ("lint", str(folder))):
        result = generate.buf(*command)
        assert result.returncode == 0, result.stdout + result.stderr


def test_contracts_break_no_client(tmp_path: Path) -> None:
    """The contracts are compatible with the committed descriptor set."""
    committed = tmp_path / "committed.binpb"
    result = subprocess.run(
        ["git", "show", f"HEAD:gen/{generate.DESCRIPTORS}"], cwd=ROOT, capture_output=True, check=False
    )
    committed.write_bytes(
        result.stdout if result.returncode == 0 else (ROOT / "gen" / generate.DESCRIPTORS).read_bytes()
    )
    generate.write_descriptors(tmp_path / "contracts.binpb")
    assert generate.breaking_changes(tmp_path / "contracts.binpb", committed) == ""


def test_breaking_change_is_detected(tmp_path: Path) -> None:
    """The removal of a field is reported with the field's name."""
    descriptors = FileDescriptorSet.FromString((ROOT / "gen" / generate.DESCRIPTORS).read_bytes())
    (transactions,) = [file for file in descriptors.file if file.name == "daybook/v1/transaction.proto"]
    fields = transactions.message_type[0].field
    del fields[[field.name for field in fields].index("balance_after")]
    (tmp_path / "broken.binpb").write_bytes(descriptors.SerializeToString())
    found = generate.breaking_changes(tmp_path / "broken.binpb", ROOT / "gen" / generate.DESCRIPTORS)
    assert "balance_after" in found


def test_missing_comment_is_detected(tmp_path: Path) -> None:
    """A field without a comment is reported."""
    shutil.copytree(generate.PROTOS, tmp_path / "protos")
    contract = tmp_path / "protos/daybook/v1/ledger_service.proto"
    comment = "  // The lots of this page.\n"
    assert comment in contract.read_text()
    contract.write_text(contract.read_text().replace(comment, ""))
    assert 'Field "lots" should have a non-empty comment' in generate.buf("lint", str(tmp_path / "protos")).stdout


def test_descriptors_contain_the_types_of_error_details() -> None:
    """The descriptor set has every type of error detail, so that Envoy can print them."""
    descriptors = FileDescriptorSet.FromString((ROOT / "gen" / generate.DESCRIPTORS).read_bytes())
    messages = {f"{file.package}.{message.name}" for file in descriptors.file for message in file.message_type}
    assert {"google.rpc.Status", "google.rpc.ErrorInfo", "google.rpc.BadRequest"} <= messages


def services_in(part: Any) -> Iterator[str]:
    """Yields every service that a transcoder in envoy.yaml serves."""
    if isinstance(part, dict):
        if "proto_descriptor" in part:
            yield from part["services"]
        for value in part.values():
            yield from services_in(value)
    elif isinstance(part, list):
        for value in part:
            yield from services_in(value)


def test_gateway_serves_every_service() -> None:
    """The server and envoy.yaml have exactly the services of the contracts."""
    descriptors = FileDescriptorSet.FromString((ROOT / "gen" / generate.DESCRIPTORS).read_bytes())
    contracts = {f"{file.package}.{service.name}" for file in descriptors.file for service in file.service}
    assert set(services_in(yaml.safe_load((ROOT / "envoy.yaml").read_text()))) == contracts == set(SERVICES)


def test_envoy_yaml_is_up_to_date() -> None:
    """envoy.yaml equals the output of `make gen`, and its first line says so."""
    text = (ROOT / "envoy.yaml").read_text()
    assert text == render(committed())
    assert "make gen" in text.partition("\n")[0]


def body_fields(message: Descriptor, before: str = "") -> Iterator[tuple[str, FieldDescriptor]]:
    """Yields every field that the JSON of a message can have, at any depth, with its path."""
    for each in message.fields:
        inside, path = each.message_type, f"{before}{each.name}"
        yield path, each
        if inside is not None and inside.full_name.startswith("daybook.") and not inside.GetOptions().map_entry:
            yield from body_fields(inside, f"{path}.")


def test_gateway_lists_all_keys_of_a_body() -> None:
    """Lua omits only keys inside free-form maps, and its limit has room for all keys of a body."""
    lua = (ROOT / "server/gateway/lua/body_keys.lua").read_text()
    free = set(read_contracts().free_fields)
    (room,) = re.findall(r"local KEYS_BYTES_MAX = (\d+)", lua)
    services = (ledger_service_pb2, admin_service_pb2)
    for method in (
        each for file in services for service in file.DESCRIPTOR.services_by_name.values() for each in service.methods
    ):
        fields = list(body_fields(method.input_type))
        for _, field in fields:
            is_free = field.message_type is not None and (
                field.message_type.full_name == Struct.DESCRIPTOR.full_name or field.message_type.GetOptions().map_entry
            )
            assert is_free == (field.name in free), field.full_name
        assert sum(len(path) + 1 for path, _ in fields) <= int(room)


def rest_paths() -> set[str]:
    """Returns every path that a facade's contract binds, spelled as in the documentation."""
    found = set()
    for contract in (ROOT / "protos/daybook/facades").rglob("*.proto"):
        found |= {path.replace("space_id", "spaceId") for path in re.findall(r'get: "([^"]+)"', contract.read_text())}
    return found


@pytest.mark.parametrize("service", FACADES)
def test_facade_is_complete(service: str) -> None:
    """Each facade has a contract, a module, a page that names its service, and golden exchanges."""
    vendor = service.split(".")[2]
    assert service in (ROOT / f"docs/facades/{vendor}.md").read_text()
    assert (ROOT / f"server/facades/{vendor}.py").is_file()
    assert list((ROOT / f"protos/daybook/facades/{vendor}/v1").glob("*_service.proto"))
    assert list((ROOT / f"tests/facades/{vendor}").glob("*.http"))


def is_matched(rule: dict[str, Any], path: str) -> bool:
    """Whether a matcher in envoy.yaml matches a path."""
    if "prefix" in rule:
        return path.startswith(rule["prefix"])
    return re.fullmatch(rule["safe_regex"]["regex"], path) is not None


def rules_for_paths(part: Any) -> Iterator[dict[str, Any]]:
    """Yields the path matchers of local replies."""
    if isinstance(part, dict):
        if part.get("header", {}).get("name") == ":path":
            yield part["header"]["string_match"]
        part = list(part.values())
    if isinstance(part, list):
        for each in part:
            yield from rules_for_paths(each)


@pytest.mark.parametrize("path", sorted(rest_paths()))
def test_gateway_and_guide_have_every_facade_path(path: str) -> None:
    """Each facade path has a route with the vendor's errors, bodies for local replies, and a command in the guide."""
    listener = yaml.safe_load((ROOT / "envoy.yaml").read_text())["static_resources"]["listeners"][0]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    (host,) = manager["route_config"]["virtual_hosts"]
    example = re.sub(r"\{[^}]+\}", "x", path)
    route = next(
        each
        for each in host["routes"]
        if not each["match"].keys() & {"grpc", "headers"} and is_matched(each["match"], example)
    )
    errors = route["metadata"]["filter_metadata"]["envoy.filters.http.lua"]["errors"]
    assert errors.keys() == {"500", "503", "504"}
    assert all(json.loads(each["body"]) for each in errors.values())
    mappers = [each for each in rules_for_paths(manager["local_reply_config"]) if is_matched(each, example)]
    assert mappers
    shown = [urlsplit(shlex.split(command)[-1]).path for command in guide.commands(guide.Gateway(1)).values()]
    assert [each for each in shown if any(is_matched(rule, each) for rule in mappers)]


def test_unwrapped_arrays_match_the_contracts() -> None:
    """The tables of vendors make Envoy unwrap exactly their responses with a response_body in their contract."""
    arrays = [entry for vendor in all_vendors() for entry in vendor.arrays.items()]
    vendors = [method for method in METHODS if method.containing_service.full_name in FACADES]
    rules = [method.GetOptions().Extensions[http] for method in vendors]
    for binding in (each for rule in rules for each in (rule, *rule.additional_bindings)):
        path = re.sub(r"\{[^}]+\}", "x", binding.get)
        assert [name for regex, name in arrays if re.fullmatch(regex, path)] == (
            [binding.response_body] if binding.response_body else []
        )


@pytest.mark.parametrize("reason", ERROR_REASONS)
def test_error_reason_has_an_example(reason: str) -> None:
    """Each error reason has an example in its comment."""
    contract = (ROOT / "protos/daybook/v1/error_reason.proto").read_text()
    assert re.search(rf'Example: {{"reason": "{reason}"', contract)


def unclosed_generators(source: str) -> Iterator[int]:
    """Yields the lines of `async for` loops over iterators that are not closed if the loop ends early.

    A loop may iterate over a name bound by `aclosing`, over a parameter, which the caller closes, or over the chunks of
    an httpx response, which its context manager closes.
    """
    tree = ast.parse(source)
    closed = {
        item.optional_vars.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AsyncWith)
        for item in node.items
        if isinstance(item.context_expr, ast.Call)
        and ast.unparse(item.context_expr.func) == "aclosing"
        and isinstance(item.optional_vars, ast.Name)
    }
    parameters = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    for node in ast.walk(tree):
        if isinstance(node, ast.AsyncFor) or (isinstance(node, ast.comprehension) and node.is_async):
            over = ast.unparse(node.iter)
            if over not in closed | parameters and over != "response.aiter_raw()":
                yield node.iter.lineno


def test_async_generators_are_closed() -> None:
    """Every async generator in the server is closed when its loop ends early, for example by a cancellation."""
    found = {
        str(path.relative_to(ROOT)): lines
        for path in sorted((ROOT / "server").rglob("*.py"))
        if (lines := list(unclosed_generators(path.read_text())))
    }
    assert not found, "use contextlib.aclosing"
    assert list(unclosed_generators("async def f():\n async for x in g():\n  pass\n y = [z async for z in h()]")) == [
        2,
        4,
    ]


def tracked_files() -> list[Path]:
    """Returns the text files that git tracks or does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / name for name in listed.stdout.splitlines() if not name.endswith(".binpb")]


def test_no_constraint_names_a_host() -> None:
    """Constraints have only names and versions, so that any package index can be used."""
    for line in (ROOT / ".ci/constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.+!-]+", line), line


def test_no_file_names_the_machine_it_was_written_on() -> None:
    """No tracked file contains the path of this checkout."""
    assert not [path for path in tracked_files() if path.is_file() and f"{ROOT}/" in path.read_text(errors="ignore")]


def test_host_and_port_are_joined_in_one_place() -> None:
    """Only server/transport/addresses.py joins a host and a port, because IPv6 addresses need brackets."""
    joined = re.compile(r"\{[^{}\n]*(host|address)[^{}\n]*\}:\{|%s:%[ds]")
    assert joined.search('f"{settings.host}:{port}"')
    assert joined.search('f"{reachable(settings.host)}:{port}"')
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for folder in ("server", "bench")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.name != "addresses.py"
        for match in joined.finditer(path.read_text())
    ]
    assert not found


def test_no_test_module_is_imported() -> None:
    """Test modules share code through tests/support/ and the campaigns, never through a test module or a conftest."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or "", *(each.name for each in node.names)]
        if re.search(r"(^|\.)(test_\w+|conftest)$", name)
    ]
    assert not found
