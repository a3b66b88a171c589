"""The contracts follow Google's AIPs. Each rule has the name that it has in the AIP linter.

The AIP linter is a Go program that a machine may lack, so this module implements its most important rules. Its
configuration, protos/api-linter.yaml, lists the exceptions. Rules that the linter lacks begin with `daybook::`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from typing import Any

import pytest
import yaml
from google.api.annotations_pb2 import http
from google.api.client_pb2 import default_host, method_signature
from google.api.field_behavior_pb2 import OUTPUT_ONLY, field_behavior
from google.api.field_info_pb2 import FieldInfo, field_info
from google.api.resource_pb2 import resource, resource_reference
from google.protobuf.descriptor import (
    Descriptor,
    EnumDescriptor,
    FieldDescriptor,
    FileDescriptor,
    MethodDescriptor,
)
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool

from protos import generate

DOMAIN = "daybook.example.com"
PREPOSITIONS = frozenset(
    ("after", "at", "before", "by", "during", "for", "from", "in", "into", "of", "on", "since", "than", "to", "with")
)
MAY_HAVE_PREPOSITION = frozenset(("order_by", "group_by"))
NAMES = frozenset(("display_name", "given_name", "family_name"))
STANDARD = ("Get", "List", "Create", "Update", "Delete", "BatchCreate")
TIMESTAMP = "google.protobuf.Timestamp"
MUTATIONS_WITHOUT_REQUEST_ID = frozenset(
    (
        # Each of its requests has a request_id.
        "daybook.v1.Ledger.SubmitTransactions",
        # To repeat the response, the secret would have to be stored.
        "daybook.v1.Admin.CreateApiKey",
        "daybook.v1.Admin.RotateApiKey",
        # It is idempotent.
        "daybook.v1.Admin.RevokeApiKey",
    )
)

Rule = Callable[[FileDescriptor], Iterator[str]]
RULES: dict[str, Rule] = {}


def rule(name: str) -> Callable[[Rule], Rule]:
    """Registers a rule, a function that yields the full names of the elements that break it."""

    def register(function: Rule) -> Rule:
        RULES[name] = function
        return function

    return register


def messages(file: FileDescriptor) -> Iterator[Descriptor]:
    """Yields every message of a file, at any depth, without map entries."""
    waiting = list(file.message_types_by_name.values())
    while waiting:
        message = waiting.pop()
        if not message.GetOptions().map_entry:
            yield message
            waiting += message.nested_types


def fields(file: FileDescriptor) -> Iterator[FieldDescriptor]:
    """Yields every field of a file."""
    for message in messages(file):
        yield from message.fields


def enums(file: FileDescriptor) -> Iterator[EnumDescriptor]:
    """Yields every enum of a file."""
    yield from file.enum_types_by_name.values()
    for message in messages(file):
        yield from message.enum_types


def methods(file: FileDescriptor, *verbs: str) -> Iterator[tuple[MethodDescriptor, str]]:
    """Yields every method of a file, or the methods with one of these standard verbs, each with its noun."""
    for service in file.services_by_name.values():
        for method in service.methods:
            verb = next((each for each in STANDARD if method.name.startswith(each)), "")
            if not verbs or verb in verbs:
                yield method, method.name.removeprefix(verb)


def type_name(field: FieldDescriptor) -> str:
    """Returns the full name of the message type of a field, or an empty text."""
    return field.message_type.full_name if field.message_type is not None else ""


def bindings(method: MethodDescriptor) -> list[tuple[str, str, str]]:
    """Returns the HTTP method, path and body of each binding of a method."""
    first = method.GetOptions().Extensions[http]
    found = [(each, each.WhichOneof("pattern")) for each in (first, *first.additional_bindings)]
    return [(verb, getattr(each, verb), each.body) for each, verb in found if verb]


def has_text(message: Descriptor, name: str) -> bool:
    """Whether a message has a singular text field of this name."""
    field = message.fields_by_name.get(name)
    return field is not None and field.type == FieldDescriptor.TYPE_STRING and not field.is_repeated


def snake(name: str) -> str:
    """Converts a name from camel case to snake case."""
    return re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower()


@rule("core::0121::resource-must-support-get")
def _resource_without_get(file: FileDescriptor) -> Iterator[str]:
    gotten = {noun for _, noun in methods(file, "Get")}
    nouns = {noun.removesuffix("s") for _, noun in methods(file, "List", "Create", "Update")}
    yield from sorted(nouns - gotten)


@rule("core::0122::name-suffix")
def _name_of_no_resource(file: FileDescriptor) -> Iterator[str]:
    yield from (each.full_name for each in fields(file) if each.name.endswith("_name") and each.name not in NAMES)


@rule("core::0123::resource-annotation")
def _name_without_resource(file: FileDescriptor) -> Iterator[str]:
    for message in file.message_types_by_name.values():
        is_call = message.name.endswith(("Request", "Response"))
        if has_text(message, "name") and not is_call and not message.GetOptions().Extensions[resource].type:
            yield message.full_name


@rule("core::0123::resource-type-name")
def _resource_type(file: FileDescriptor) -> Iterator[str]:
    for message in messages(file):
        described = message.GetOptions().Extensions[resource]
        if described.type and described.type != f"{DOMAIN}/{message.name}":
            yield message.full_name


@rule("core::0123::resource-plural")
def _resource_words(file: FileDescriptor) -> Iterator[str]:
    for message in messages(file):
        described = message.GetOptions().Extensions[resource]
        if described.type and not (described.singular and described.plural and described.pattern):
            yield message.full_name


@rule("core::0126::unspecified")
def _enum_without_zero(file: FileDescriptor) -> Iterator[str]:
    for enum in enums(file):
        if (enum.values[0].name, enum.values[0].number) != (f"{snake(enum.name).upper()}_UNSPECIFIED", 0):
            yield enum.full_name


@rule("core::0127::http-annotation")
def _method_without_path(file: FileDescriptor) -> Iterator[str]:
    yield from (method.full_name for method, _ in methods(file) if not bindings(method))


@rule("core::0127::resource-name-extraction")
def _bare_variable(file: FileDescriptor) -> Iterator[str]:
    for method, _ in methods(file):
        if any(re.search(r"\{[^=}]+\}", path) for _, path, _ in bindings(method)):
            yield method.full_name


@rule("core::0131::request-name-required")
def _get(file: FileDescriptor) -> Iterator[str]:
    for method, noun in methods(file, "Get"):
        signature = list(method.GetOptions().Extensions[method_signature])
        shape = (method.output_type.name, [each[0] for each in bindings(method)], signature)
        if not has_text(method.input_type, "name") or shape != (noun, ["get"], ["name"]):
            yield method.full_name


@rule("core::0132::response-unknown-fields")
def _list(file: FileDescriptor) -> Iterator[str]:
    for method, noun in methods(file, "List"):
        shape = (method.output_type.name, [each[0] for each in bindings(method)])
        first = method.output_type.fields[0]
        if shape != (f"List{noun}Response", ["get"]) or not (first.is_repeated and first.name == snake(noun)):
            yield method.full_name


@rule("core::0133::response-message-name")
def _create(file: FileDescriptor) -> Iterator[str]:
    for method, noun in methods(file, "Create"):
        shape = (method.output_type.name, [(verb, body) for verb, _, body in bindings(method)])
        if shape != (noun, [("post", snake(noun))]):
            yield method.full_name


@rule("core::0133::request-id-field")
def _create_without_id(file: FileDescriptor) -> Iterator[str]:
    for method, noun in methods(file, "Create"):
        if not has_text(method.input_type, f"{snake(noun)}_id"):
            yield method.full_name


@rule("core::0133::request-unknown-fields")
def _create_with_more(file: FileDescriptor) -> Iterator[str]:
    for method, noun in methods(file, "Create"):
        known = {"parent", snake(noun), f"{snake(noun)}_id", "request_id", "validate_only"}
        yield from (each.full_name for each in method.input_type.fields if each.name not in known)


@rule("core::0134::request-mask-field")
def _update(file: FileDescriptor) -> Iterator[str]:
    for method, noun in methods(file, "Update"):
        mask = method.input_type.fields_by_name.get("update_mask")
        shape = (method.output_type.name, [(verb, body) for verb, _, body in bindings(method)])
        if mask is None or type_name(mask) != "google.protobuf.FieldMask" or shape != (noun, [("patch", snake(noun))]):
            yield method.full_name


@rule("core::0136::http-uri-suffix")
def _custom_verb(file: FileDescriptor) -> Iterator[str]:
    """The path ends with the verb, and with the noun unless that is the collection or resource of the path."""
    for method, _ in methods(file, ""):
        verb, _, noun = snake(method.name).partition("_")
        for _, path, _ in bindings(method):
            collections = re.findall(r"[A-Za-z]+(?=/\*|[:}]|$)", path.rpartition(":")[0])
            words = {snake(word) for word in collections} | {snake(word).removesuffix("s") for word in collections}
            camel = "".join(word.capitalize() for word in noun.split("_"))
            if path.rpartition(":")[2] != (verb if noun in words else f"{verb}{camel}"):
                yield method.full_name


@rule("core::0140::prepositions")
def _preposition(file: FileDescriptor) -> Iterator[str]:
    for name, full_name in (
        *((each.name, each.full_name) for each in fields(file) if each.name not in MAY_HAVE_PREPOSITION),
        *((snake(method.name), method.full_name) for method, _ in methods(file)),
    ):
        if PREPOSITIONS & set(name.split("_")):
            yield full_name


@rule("core::0142::time-field-names")
def _time_by_name(file: FileDescriptor) -> Iterator[str]:
    for each in fields(file):
        if type_name(each) == TIMESTAMP and not re.search(r"(?<!created|updated|expired)_time$", each.name):
            yield each.full_name


@rule("core::0142::time-field-type")
def _time_by_type(file: FileDescriptor) -> Iterator[str]:
    for each in fields(file):
        if re.search(r"_(time|date|at|timestamp|seconds|millis)$", each.name) and type_name(each) != TIMESTAMP:
            yield each.full_name


@rule("core::0143::standardized-codes")
def _code(file: FileDescriptor) -> Iterator[str]:
    yield from (each.full_name for each in fields(file) if each.name in {"country", "country_code", "currency"})


@rule("core::0148::uid-format")
def _uid(file: FileDescriptor) -> Iterator[str]:
    yield from _without_format(file, "uid")


@rule("core::0155::request-id-format")
def _request_id(file: FileDescriptor) -> Iterator[str]:
    yield from _without_format(file, "request_id")


def _without_format(file: FileDescriptor, name: str) -> Iterator[str]:
    for each in fields(file):
        if each.name == name and each.GetOptions().Extensions[field_info].format != FieldInfo.UUID4:
            yield each.full_name


@rule("core::0158::request-page-size-field")
def _pagination(file: FileDescriptor) -> Iterator[str]:
    for method, _ in methods(file, "List"):
        size = method.input_type.fields_by_name.get("page_size")
        if (
            size is None
            or size.type != FieldDescriptor.TYPE_INT32
            or not has_text(method.input_type, "page_token")
            or not has_text(method.output_type, "next_page_token")
        ):
            yield method.full_name


@rule("core::0191::java-package")
def _options(file: FileDescriptor) -> Iterator[str]:
    options = file.GetOptions()
    stem = file.name.rpartition("/")[2].removesuffix(".proto")
    host, _, alias = options.go_package.partition(";")
    expected = (
        f"com.example.{file.package}",
        True,
        "".join(word.capitalize() for word in stem.split("_")) + "Proto",
        f"{DOMAIN}/go/{file.package.replace('.', '/')}",
        "".join(file.package.split(".")[-2:]),
        file.package.lower(),
    )
    java = (options.java_package, options.java_multiple_files, options.java_outer_classname)
    if (*java, host, alias, options.csharp_namespace.lower()) != expected:
        yield file.name


@rule("core::0203::field-behavior-required")
def _behavior(file: FileDescriptor) -> Iterator[str]:
    waiting, seen = [method.input_type for method, _ in methods(file)], set()
    while waiting:
        message = waiting.pop()
        if message.full_name in seen or message.file.package != file.package or message.GetOptions().map_entry:
            continue
        seen.add(message.full_name)
        for each in message.fields:
            if not each.GetOptions().Extensions[field_behavior] and each.containing_oneof is None:
                yield each.full_name
            if each.message_type is not None:
                waiting.append(each.message_type)


@rule("core::0216::state-field-output-only")
def _state(file: FileDescriptor) -> Iterator[str]:
    for each in fields(file):
        is_state = each.enum_type is not None and each.enum_type.name.endswith("State")
        if is_state and OUTPUT_ONLY not in each.GetOptions().Extensions[field_behavior]:
            yield each.full_name


@rule("core::0216::value-synonyms")
def _state_values(file: FileDescriptor) -> Iterator[str]:
    synonyms = {"CANCELED", "CANCELING", "FAILURE", "IN_PROGRESS", "PROCESSING", "READY", "SUCCESS"}
    for enum in enums(file):
        if enum.name.endswith("State"):
            yield from (value.name for value in enum.values if value.name in synonyms)


@rule("core::0233::request-requests-field")
def _batch(file: FileDescriptor) -> Iterator[str]:
    for method, nouns in methods(file, "BatchCreate"):
        requests = method.input_type.fields_by_name.get("requests")
        paths = [(verb, path.rpartition(":")[2], body) for verb, path, body in bindings(method)]
        if (
            requests is None
            or not requests.is_repeated
            or type_name(requests).rpartition(".")[2] != f"Create{nouns.removesuffix('s')}Request"
            or method.output_type.fields[0].name != snake(nouns)
            or paths != [("post", "batchCreate", "*")]
        ):
            yield method.full_name


@rule("daybook::default-host")
def _host(file: FileDescriptor) -> Iterator[str]:
    for service in file.services_by_name.values():
        if service.GetOptions().Extensions[default_host] != DOMAIN:
            yield service.full_name


@rule("daybook::request-id")
def _mutation_without_request_id(file: FileDescriptor) -> Iterator[str]:
    for method, _ in methods(file):
        changes = {verb for verb, _, _ in bindings(method)} - {"get"}
        has_id = has_text(method.input_type, "request_id")
        if changes and has_id == (method.full_name in MUTATIONS_WITHOUT_REQUEST_ID):
            yield method.full_name


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> FileDescriptorSet:
    """The descriptors of the contracts, with comments."""
    path = tmp_path_factory.mktemp("contracts") / "contracts.binpb"
    generate.write_descriptors(path, source_info=True)
    return FileDescriptorSet.FromString(path.read_bytes())


def load(files: Any) -> DescriptorPool:
    """Returns a pool with only these files."""
    pool = DescriptorPool()
    for file in files:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


def exceptions() -> list[tuple[str, str]]:
    """Returns the exceptions in protos/api-linter.yaml, each with a path pattern and a rule or a group of rules."""
    configurations = yaml.safe_load((generate.PROTOS / "api-linter.yaml").read_text())
    return [
        (path.replace("**/", ""), name)
        for each in configurations
        for path in each["included_paths"]
        for name in each["disabled_rules"]
    ]


def excepts(path: str, name: str, exception: tuple[str, str]) -> bool:
    """Whether an exception applies to a file and a rule."""
    return fnmatch(path, exception[0]) and (name == exception[1] or name.startswith(f"{exception[1]}::"))


@pytest.mark.parametrize("name", RULES)
def test_contracts_follow_the_rule(described: FileDescriptorSet, name: str) -> None:
    """No element of a contract breaks the rule, except for the listed exceptions."""
    pool, listed = load(described.file), exceptions()
    found = {
        path: broken
        for path in generate.files_in(generate.PROTOS)
        if not any(excepts(path, name, each) for each in listed)
        and (broken := list(RULES[name](pool.FindFileByName(path))))
    }
    assert not found


@pytest.mark.parametrize("exception", exceptions(), ids="-".join)
def test_exception_is_needed(described: FileDescriptorSet, exception: tuple[str, str]) -> None:
    """Each exception allows an element that its rule finds, and has a comment with the reason."""
    pool = load(described.file)
    assert [
        broken
        for path in generate.files_in(generate.PROTOS)
        for name, find in RULES.items()
        if excepts(path, name, exception)
        for broken in find(pool.FindFileByName(path))
    ]
    lines = (generate.PROTOS / "api-linter.yaml").read_text().splitlines()
    assert all("  # " in line for line in lines if line.strip().startswith("- core::"))


def comments(file: FileDescriptorProto) -> dict[tuple[int, ...], str]:
    """Returns the comments of a file, by the paths of their elements."""
    return {tuple(each.path): each.leading_comments for each in file.source_code_info.location}


def resource_names(described: FileDescriptorSet) -> Iterator[tuple[str, str]]:
    """Yields each text field whose comment has the pattern of a resource, with the type that it refers to."""

    def of_message(message: Any, path: tuple[int, ...], texts: dict[tuple[int, ...], str], scope: str) -> Any:
        for number, field in enumerate(message.field):
            shown = re.search(r"`[a-zA-Z]+/\{[^`]*`", texts.get((*path, 2, number), ""))
            if shown and not message.options.Extensions[resource].type:
                reference = field.options.Extensions[resource_reference]
                yield f"{scope}{message.name}.{field.name}", reference.type or reference.child_type
            elif shown and field.name != "name":
                yield f"{scope}{message.name}.{field.name}", field.options.Extensions[resource_reference].type
        for number, nested in enumerate(message.nested_type):
            yield from of_message(nested, (*path, 3, number), texts, f"{scope}{message.name}.")

    for file in described.file:
        if file.package == "daybook.v1":
            for number, message in enumerate(file.message_type):
                yield from of_message(message, (4, number), comments(file), "")


def test_resource_names_have_their_type(described: FileDescriptorSet) -> None:
    """Each field whose comment has the pattern of a resource has a reference to an existing resource type."""
    found = dict(resource_names(described))
    assert {"Transaction.refund_of", "Allocation.lot", "GetAccountRequest.name", "ApiKey.account"} <= found.keys()
    types = {message.options.Extensions[resource].type for file in described.file for message in file.message_type} - {
        ""
    }
    assert not {name: kind for name, kind in found.items() if kind not in types}


def test_lines_are_wrapped() -> None:
    """No line of a contract has more than 120 characters."""
    for path in generate.files_in(generate.PROTOS):
        assert [line for line in (generate.PROTOS / path).read_text().splitlines() if len(line) > 120] == []


BAD = """
syntax = "proto3";
package bad.v1;
import "google/api/annotations.proto";
import "google/api/resource.proto";
import "google/protobuf/timestamp.proto";
service Things {
  rpc GetThing(GetThingRequest) returns (GetThingResponse) { option (google.api.http) = {get: "/v1/{thing}"}; }
  rpc ListThings(ListThingsRequest) returns (ListThingsResponse) { option (google.api.http) = {post: "/v1/things"}; }
  rpc CreateThing(CreateThingRequest) returns (CreateThingResponse) { option (google.api.http) = {put: "/v1/things"}; }
  rpc UpdateThing(UpdateThingRequest) returns (Thing) { option (google.api.http) = {patch: "/v1/things"}; }
  rpc BatchCreateThings(CreateThingRequest) returns (ListThingsResponse) {
    option (google.api.http) = {post: "/v1/things:bulk"};
  }
  rpc MoveCredits(GetThingRequest) returns (Thing) { option (google.api.http) = {post: "/v1/{name=things/*}:move"}; }
  rpc FindThingsByName(GetThingRequest) returns (Thing);
  rpc CreateLot(GetThingRequest) returns (Lot) { option (google.api.http) = {post: "/v1/lots" body: "lot"}; }
}
message GetThingRequest { string thing = 1; }
message GetThingResponse { Thing thing = 1; }
message ListThingsRequest { int64 page_size = 1; }
message ListThingsResponse { Thing thing = 1; }
message CreateThingRequest { Thing thing = 1; bool loud = 2; string request_id = 3; }
message CreateThingResponse { Thing thing = 1; }
message UpdateThingRequest { Thing thing = 1; }
message Lot {
  option (google.api.resource) = {type: "daybook/Lot"};
  string name = 1;
}
message Thing {
  enum State { UNKNOWN = 0; CANCELED = 1; }
  string name = 1;
  string uid = 2;
  string legal_name = 3;
  string amount_of = 4;
  string country_code = 5;
  google.protobuf.Timestamp created = 6;
  int64 expire_time = 7;
  State state = 8;
}
"""


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> FileDescriptor:
    """A contract that breaks every rule."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "bad.proto").write_text(BAD)
    generate.run_protoc(f"-I{folder}", f"--descriptor_set_out={folder / 'set'}", "--include_imports", "bad.proto")
    return load(FileDescriptorSet.FromString((folder / "set").read_bytes()).file).FindFileByName("bad.proto")


@pytest.mark.parametrize("name", RULES)
def test_rule_finds_a_violation(bad: FileDescriptor, name: str) -> None:
    """Each rule finds an element in a contract that breaks all rules."""
    assert list(RULES[name](bad))
