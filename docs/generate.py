"""Generates the tables of the documentation from the code and the contracts: `python -m docs.generate`.

A page has a line `<!-- generated: NAME -->`, the table, and a line `<!-- end -->`. `make gen` replaces the text between
these lines. tests/test_docs.py checks that the committed pages are up to date.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Union, get_args, get_origin

import typer
import yaml
from daybook.v1.error_reason_pb2 import ErrorReason
from daybook.v1.scope_pb2 import scope as scope_option
from google.api.annotations_pb2 import http
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from protos import generate as contracts
from server.book import open_book
from server.cli import COMMANDS, HIDDEN
from server.config import Settings
from server.ledger import errors
from server.ledger.errors import DaybookError
from server.metrics import Metrics
from server.transport.admission import Admission, Admissions
from server.transport.errors import code_of, http_status_of

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- generated: ([a-z-]+) -->\n).*?(<!-- end -->\n)", re.DOTALL)


FACADE_PAGE_SIZES = tuple(
    f"facades.{file.stem}.{name}"
    for file in sorted((ROOT / "server/facades").glob("*.py"))
    for name in re.findall(r"^([A-Z][A-Z_]*_MAX)\b.* = ", file.read_text(), re.MULTILINE)
    if name not in {"OFFSET_MAX", "NUMERIC_ID_DIGITS_MAX"}
)
"""The constants of all facades that limit the rows of a page."""


class Limit(NamedTuple):
    """A row of the table of limits. The number comes from the code."""

    name: str
    """The quantity that is limited."""
    unit: str
    source: str
    """A setting, a constant as `module.NAME` below server, or a key of `gateway_limits`."""
    beyond: str
    """What happens beyond the limit."""
    equal: tuple[str, ...] = ()
    """Constants with the same value."""


LIMITS: Sequence[tuple[str, Sequence[Limit]]] = (
    (
        "Calls and connections",
        (
            Limit("Running calls of a server process", "calls", "calls_in_flight_max", "waits for admission"),
            Limit(
                "Running imports, exports and verifications of a server process",
                "streams",
                "streams_in_flight_max",
                "`TOO_BUSY` at once",
            ),
            Limit(
                "Running streams of health and reflection, of a server process",
                "streams",
                "transport.open_services.OPEN_STREAMS_MAX",
                "`TOO_BUSY` at once",
            ),
            Limit(
                "Wait for the message of a health check",
                "s",
                "transport.open_services.OPEN_REQUEST_SECONDS_MAX",
                "`TIMED_OUT`",
            ),
            Limit("Wait for admission", "s", "admission_seconds_max", "`TOO_BUSY`, 429 over REST"),
            Limit(
                "Calls that wait for admission", "calls", "transport.admission.WAITING_CALLS_MAX", "`TOO_BUSY` at once"
            ),
            Limit(
                "Calls that gRPC holds for a server process",
                "calls",
                "app.PENDING_CALLS_MAX",
                "`RESOURCE_EXHAUSTED` or `CANCELLED` without a reason",
            ),
            Limit(
                "Running calls of a connection to a server",
                "calls",
                "concurrent_streams_max",
                "waits until one has ended",
            ),
            Limit(
                "Running calls of a connection to the gateway",
                "calls",
                "gateway: concurrent streams",
                "waits until one has ended",
            ),
            Limit("Running writes of a gateway, for each server that it lists", "requests", "gateway: writes", "429"),
            Limit("Running reads of a gateway", "requests", "gateway: reads", "429"),
            Limit("Length of the posting queue", "calls", "posting.poster.QUEUE_LENGTH_MAX", "`TOO_BUSY`"),
            Limit("Running verifications", "", "usecases.verification.IN_FLIGHT_MAX", "`TOO_BUSY`"),
        ),
    ),
    (
        "Time",
        (
            Limit("Duration of a call", "s", "call_seconds_max", "`TIMED_OUT`, 504 over REST"),
            Limit("Duration of a stream", "s", "stream_seconds_max", "`TIMED_OUT`, 504 over REST"),
            Limit(
                "Wait of a stream for its next message", "s", "stream_idle_seconds_max", "`TIMED_OUT`, 504 over REST"
            ),
            Limit("Handshake", "s", "handshake_seconds_max", "the server closes the connection"),
            Limit("Connection without a call", "s", "connection_idle_seconds_max", "the server closes the connection"),
            Limit("Age of a connection", "s", "connection_age_seconds_max", "the server asks the client to reconnect"),
        ),
    ),
    (
        "Rates",
        (
            Limit(
                "Calls of a credential per second",
                "calls",
                "rate_limit_calls_per_second",
                "`RATE_LIMITED`, 429 over REST",
            ),
            Limit("Burst of a credential", "calls", "rate_limit_burst", "`RATE_LIMITED`, 429 over REST"),
            Limit(
                "Requests of a credential at a gateway per second",
                "requests",
                "gateway_rate_limit_requests_per_second",
                "429; `RESOURCE_EXHAUSTED` over gRPC",
            ),
            Limit(
                "Burst of a credential at a gateway",
                "requests",
                "gateway_rate_limit_burst",
                "429; `RESOURCE_EXHAUSTED` over gRPC",
            ),
        ),
    ),
    (
        "Pages and batches",
        (
            Limit(
                "Rows of a native page",
                "rows",
                "page_size_max",
                "the page has this many rows",
                equal=("transport.validation.PAGE_SIZE_MAX",),
            ),
            Limit(
                "Rows of a facade's page",
                "rows",
                FACADE_PAGE_SIZES[0],
                "as the facade's page says",
                equal=FACADE_PAGE_SIZES,
            ),
            Limit("Rows of a page, in bytes", "bytes", "ledger.paging.PAGE_BYTES_MAX", "the page ends early"),
            Limit(
                "Rows read for a page whose filter no index serves",
                "rows",
                "store.list_statements.ROWS_READ_MAX",
                "the page ends early",
            ),
            Limit(
                "Combinations of category, kind and state in a merged list",
                "",
                "store.list_statements.SCANS_MAX",
                "the filter is applied to rows read, so pages may end early",
            ),
            Limit("Offset of Nebula Block's list", "", "facades.nebulablock.OFFSET_MAX", "400"),
            Limit(
                "Requests of a batch, items of an import message",
                "",
                "batch_size_max",
                "`FIELD_INVALID`",
                equal=("transport.validation.BATCH_SIZE_MAX",),
            ),
            Limit("Requests of a batch, in bytes", "bytes", "rpc.transactions.BATCH_BYTES_MAX", "`FIELD_INVALID`"),
            Limit("Lots that one transaction takes from", "lots", "ledger.posting.LOTS_TAKEN_MAX", "`TOO_MANY_LOTS`"),
        ),
    ),
    (
        "Messages and headers",
        (
            Limit("Request message over gRPC", "bytes", "message_bytes_max", "`RESOURCE_EXHAUSTED`"),
            Limit(
                "Answer message, unless `message_bytes_max` is larger",
                "bytes",
                "app.ANSWER_BYTES_MAX",
                "never reached: pages end at 2 MiB",
            ),
            Limit(
                "Metadata of a call over gRPC",
                "bytes",
                "metadata_bytes_max",
                "`RESOURCE_EXHAUSTED`: with growing probability, and always from twice the limit",
            ),
            Limit(
                "Body over REST, unless `message_bytes_max` is smaller",
                "bytes",
                "gateway: body",
                "413, `REQUEST_TOO_LARGE`",
            ),
            Limit("Headers of a request, with its path", "KiB", "gateway: headers", "431, `REQUEST_TOO_LARGE`"),
            Limit("Number of headers", "headers", "gateway: header count", "431, `REQUEST_TOO_LARGE`"),
            Limit("Credential", "characters", "transport.auth.CREDENTIAL_CHARACTERS_MAX", "`CREDENTIAL_INVALID`"),
        ),
    ),
    (
        "Fields",
        (
            Limit(
                "Any text of a request, beside the limit of its field in the contract",
                "characters",
                "text_characters_max",
                "`FIELD_INVALID`",
                equal=("transport.validation.TEXT_CHARACTERS_MAX",),
            ),
            Limit("Page token", "characters", "transport.page_tokens.TOKEN_CHARACTERS_MAX", "`PAGE_TOKEN_INVALID`"),
            Limit("Filter", "characters", "transport.filters.FILTER_CHARACTERS_MAX", "`FILTER_INVALID`"),
            Limit("Values of one field of a filter", "values", "transport.filters.VALUES_MAX", "`FILTER_INVALID`"),
            Limit("request_id", "characters", "transport.validation.REQUEST_ID_CHARACTERS_MAX", "`FIELD_INVALID`"),
            Limit("Labels of a transaction", "labels", "transport.validation.LABELS_MAX", "`FIELD_INVALID`"),
            Limit("Value of a label", "characters", "transport.validation.LABEL_CHARACTERS_MAX", "`FIELD_INVALID`"),
            Limit("Priority, above or below 0", "", "transport.validation.PRIORITY_MAX", "`FIELD_INVALID`"),
            Limit(
                "Metadata of a transaction or a company",
                "bytes",
                "transport.metadata.METADATA_BYTES_MAX",
                "`FIELD_INVALID`",
            ),
            Limit("Depth of that metadata", "levels", "transport.metadata.METADATA_DEPTH_MAX", "`FIELD_INVALID`"),
            Limit(
                "Number in that metadata, above or below 0",
                "",
                "transport.metadata.METADATA_NUMBER_MAX",
                "`FIELD_INVALID`",
            ),
            Limit("Display name", "characters", "transport.validation.DISPLAY_NAME_CHARACTERS_MAX", "`FIELD_INVALID`"),
            Limit("Time to live", "days", "transport.validation.TIME_TO_LIVE_DAYS_MAX", "`FIELD_INVALID`"),
            Limit(
                "Grace period of an API key", "days", "transport.validation.GRACE_PERIOD_DAYS_MAX", "`FIELD_INVALID`"
            ),
            Limit(
                "Old secrets of an API key that stay valid",
                "secrets",
                "ledger.access.RETIRED_SECRETS_MAX",
                "the one that ends first is dropped",
            ),
        ),
    ),
)

SETTINGS_GROUPS = (
    ("Database", r"database_", "[PostgreSQL](../operate/postgresql.md), [read replica](../operate/replica.md)"),
    ("Page tokens", r"token_keys", "[Keys of page tokens](../operate/keys.md#keys-of-page-tokens)"),
    ("TLS", r"tls_|gateway_(tls|server|client)_", "[TLS](../operate/tls.md)"),
    ("Access tokens", r"oauth2_", "[Access tokens](../operate/access-tokens.md)"),
    ("Watching", r"metrics_|otlp_|trace_|log_", "[Watching](../operate/watching.md)"),
    ("Gateway", r"gateway_", "[Deploy](../operate/deploy.md), [limits](../operate/limits.md)"),
    ("Limits", r".*_max$|keepalive_|rate_limit_", "[Limits](../operate/limits.md)"),
    ("Server", r"", "[Processes](../operate/processes.md), [clocks](../operate/clocks.md)"),
)
"""Headings of the settings page, each with a pattern and links. A setting is listed below the first heading whose
pattern matches its name.
"""

UNITS = (
    (r"_per_second$", "per second"),
    (r"_seconds(_max)?$", "seconds"),
    (r"_bytes_max$", "bytes"),
    (r"_characters_max$", "characters"),
    (r"_port(_base)?$|^port$", "port"),
    (r"_file$", "path"),
    (r"^host$|_host$", "address"),
    (r"_url$", "URL"),
    (r"_ratio$", "ratio"),
)
"""Units by the ending of a setting's name."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table. Escapes `|` in cells."""
    lines = (header, ["---"] * len(header), *rows)
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in line)}|\n" for line in cells)


def settings() -> str:
    """Returns a table of the settings of each group."""
    groups: dict[str, list[Sequence[str]]] = {heading: [] for heading, _, _ in SETTINGS_GROUPS}
    for name, field in Settings.model_fields.items():
        heading = next(heading for heading, pattern, _ in SETTINGS_GROUPS if re.match(pattern, name))
        groups[heading].append((f"`{name}`", type_and_unit(name, field), shown(field.default), str(field.description)))
    return "\n".join(
        f"## {heading}\n\nExplained in: {links}.\n\n"
        + table(("name", "type and unit", "default", "meaning"), groups[heading])
        for heading, _, links in SETTINGS_GROUPS
    )


def type_and_unit(name: str, field: FieldInfo) -> str:
    """Returns the type or unit of a setting, and its bounds."""
    kind = field.annotation
    if get_origin(kind) in {types.UnionType, Union}:
        (kind,) = (each for each in get_args(kind) if each is not types.NoneType)
    if get_args(kind) and isinstance(get_args(kind)[0], str):
        return ", ".join(f"`{each}`" for each in get_args(kind))
    if get_origin(kind) is tuple:
        return "list, with spaces or commas"
    unit = next((unit for pattern, unit in UNITS if re.search(pattern, name)), "")
    if not unit:
        unit = "count" if kind is int else "text"
    bounds = {
        bound: getattr(each, bound) for each in field.metadata for bound in ("ge", "gt", "le") if hasattr(each, bound)
    }
    if "le" not in bounds:
        return unit
    highest = f"{bounds['le']:,}"
    return f"{unit}, {bounds['ge']:,} to {highest}" if "ge" in bounds else f"{unit}, above 0, at most {highest}"


def shown(default: object) -> str:
    """Returns the default of a setting as Markdown."""
    match default:
        case None | "":
            return ""
        case SecretStr():
            return shown(default.get_secret_value())
        case float():
            return f"`{default:g}`"
        case tuple():
            return f"`{' '.join(default)}`"
    return f"`{default}`"


def limits() -> str:
    """Returns a table of the limits of each group."""
    header = ("limit", "value", "setting", "beyond it")
    return "\n".join(f"## {heading}\n\n{table(header, map(limit_row, rows))}" for heading, rows in LIMITS)


def limit_row(limit: Limit) -> Sequence[str]:
    """Returns the cells of a limit. Raises ValueError if constants that must be equal differ."""
    is_setting = limit.source in Settings.model_fields
    value = Settings.model_fields[limit.source].default if is_setting else constant(limit.source)
    if any(constant(each) != value for each in limit.equal):
        raise ValueError(f"{limit.source} and {limit.equal} differ")
    return (
        limit.name,
        f"{value:,.10g} {limit.unit}".rstrip() if isinstance(value, float) else f"{value:,} {limit.unit}".rstrip(),
        f"`{limit.source}`" if is_setting else "",
        limit.beyond,
    )


def constant(source: str) -> int:
    """Returns the value of a constant below server, or of a limit of the gateway."""
    if source.startswith("gateway: "):
        return gateway_limits()[source.removeprefix("gateway: ")]
    module, _, name = source.rpartition(".")
    value: int = getattr(import_module(f"server.{module}"), name)
    return value


@cache
def gateway_limits() -> Mapping[str, int]:
    """Returns the limits in envoy.yaml."""
    configuration = yaml.safe_load((ROOT / "envoy.yaml").read_text())["static_resources"]
    manager: Any = configuration["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    (buffer,) = (each["typed_config"] for each in manager["http_filters"] if each["name"].endswith(".buffer"))
    writes, reads = configuration["clusters"][0]["circuit_breakers"]["thresholds"]
    return {
        "body": buffer["max_request_bytes"],
        "headers": manager["max_request_headers_kb"],
        "header count": manager["common_http_protocol_options"]["max_headers_count"],
        "concurrent streams": manager["http2_protocol_options"]["max_concurrent_streams"],
        "writes": writes["max_requests"],
        "reads": reads["max_requests"],
    }


def metrics() -> str:
    """Returns a table of the metrics of the server, without the metrics of the process and of Python."""

    async def collect() -> list[Any]:
        with tempfile.TemporaryDirectory() as folder:
            async with open_book(f"sqlite+aiosqlite:///{folder}/daybook.db") as book:
                return list(Metrics(book, Admissions(Admission(1), Admission(1))).registry.collect())

    rows = []
    for family in asyncio.run(collect()):
        if family.name.startswith("daybook_"):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            rows.append((f"`{name}`", family.type, family.documentation))
    return table(("metric", "type", "meaning"), rows)


def commands() -> str:
    """Returns a section for each command, with its arguments and options."""
    return "\n".join(command_section(name, command) for name, command in leaf_commands())


CONNECTION = {"profile", "address"}
"""The options of every command that calls a server."""


def leaf_commands() -> Iterator[tuple[str, Any]]:
    """Yields every visible command of `daybook` with its name."""
    for name, entry in COMMANDS.items():
        if name not in HIDDEN:
            group: Any = typer.main.get_group(import_module(f"server.cli.{entry.module}").app)
            command = group.commands[name]
            if hasattr(command, "commands"):
                yield from ((f"{name} {below}", each) for below, each in command.commands.items())
            else:
                yield name, command


def command_section(name: str, command: Any) -> str:
    """Returns the section of a command."""
    flags = [f"--{each.name.replace('_', '-')}" for each in command.params if each.name in Settings.model_fields]
    own = [each for each in command.params if each.name not in {*Settings.model_fields, *CONNECTION}]
    shared = ["[SETTINGS]"] * bool(flags) + ["[CONNECTION]"] * any(each.name in CONNECTION for each in command.params)
    usage = " ".join(["daybook", name, *(placeholder(each) for each in own), *shared])
    text = "\n\n".join(" ".join(each.split()) for each in command.help.split("\n\n"))
    parts = [f"## daybook {name}\n", f"{text}\n", f"```text\n{usage}\n```\n"]
    if own:
        rows = [
            (f"`{each.opts[0] if each.param_type_name == 'option' else each.name.upper()}`", each.help) for each in own
        ]
        parts.append(table(("argument", "meaning"), rows))
    if flags:
        parts.append(f"Settings with a flag: {', '.join(f'`{flag}`' for flag in flags)}.\n")
    return "\n".join(parts)


def placeholder(parameter: Any) -> str:
    """Returns an argument or an option as it appears in the usage of a command."""
    if parameter.param_type_name == "argument":
        return str(parameter.name.upper()) if parameter.required else f"[{parameter.name.upper()}]"
    text = parameter.opts[0] if parameter.is_flag else f"{parameter.opts[0]} {parameter.name.upper()}"
    more = "..." if parameter.multiple else ""
    return f"{text}{more}" if parameter.required else f"[{text}]{more}"


class Comments:
    """The comments of a proto file, by their paths in its descriptor."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self._texts = {tuple(each.path): each.leading_comments for each in file.source_code_info.location}

    def paragraphs(self, *path: int) -> list[str]:
        """Returns the paragraphs of a comment, each in one line."""
        return [" ".join(each.split()) for each in self._texts[path].strip().split("\n\n")]


@cache
def described() -> Sequence[FileDescriptorProto]:
    """Returns the descriptors of Daybook's contracts and their imports, with comments."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "contracts.binpb"
        contracts.write_descriptors(path, source_info=True)
        return FileDescriptorSet.FromString(path.read_bytes()).file


def leaves() -> Iterator[type[DaybookError]]:
    """Yields the class of each reason that the server raises."""
    for each in vars(errors).values():
        if isinstance(each, type) and issubclass(each, DaybookError) and hasattr(each, "reason"):
            yield each


class Reason(NamedTuple):
    """A reason of errors, from its comment in the contract."""

    name: str
    code: str
    """The name of its gRPC code."""
    http_statuses: Sequence[int]
    """Empty if it occurs only over gRPC."""
    meaning: str


def error_reasons() -> list[Reason]:
    """Returns the error reasons. Raises ValueError if a status in a comment differs from the server's."""
    (file,) = (each for each in described() if each.name.endswith("error_reason.proto"))
    comments = Comments(file)
    # The status depends only on the class.
    refusals = [each.__new__(each) for each in leaves()]
    status_of_code = {code_of(each).name: http_status_of(each) for each in refusals}
    code_of_reason = {each.reason: code_of(each).name for each in refusals}
    found = []
    for index, value in enumerate(file.enum_type[0].value):
        if value.number == ErrorReason.ERROR_REASON_UNSPECIFIED:
            continue
        text = " ".join(each for each in comments.paragraphs(5, 0, 2, index) if not each.startswith("Example:"))
        (code,) = re.findall(r"Status ([A-Z_]+)", text)
        if code_of_reason.get(value.name, code) != code:
            raise ValueError(f"{value.name} is {code_of_reason[value.name]} in the server, {code} in its comment")
        named = [int(status) for status in re.findall(r"HTTP (\d{3})", text)]
        http_statuses = [] if "gRPC only" in text else named or [status_of_code[code]]
        meaning = re.sub(r"\s*Status [A-Z_]+(, HTTP \d{3})?\.", "", text)
        found.append(Reason(value.name, code, http_statuses, meaning))
    return found


def reasons() -> str:
    """Returns a table of the error reasons."""
    rows = [
        (f"`{each.name}`", f"`{each.code}`", ", ".join(map(str, each.http_statuses)), each.meaning)
        for each in error_reasons()
    ]
    return table(("reason", "gRPC code", "HTTP status", "meaning"), rows)


def methods() -> str:
    """Returns a table of the methods of each service, with their REST paths and scopes."""
    sections = []
    for file in described():
        comments = Comments(file)
        for number, service in enumerate(file.service):
            rows = []
            for index, method in enumerate(service.method):
                rule = method.options.Extensions[http]
                bindings = [rule, *rule.additional_bindings] if method.options.HasExtension(http) else []
                paths = [f"`{verb} {rest_path(path)}`" for verb, path in map(verb_and_path, bindings)]
                scopes = [f"`{each}`" for each in method.options.Extensions[scope_option]]
                first = comments.paragraphs(6, number, 2, index)[0]
                rows.append((f"`{method.name}`", "<br>".join(paths) or "gRPC only", " or ".join(scopes), first))
            sections.append(
                f"## {file.package}.{service.name}\n\n" + table(("method", "REST", "scope", "meaning"), rows)
            )
    return "\n".join(sections)


def verb_and_path(rule: Any) -> tuple[str, str]:
    """Returns the HTTP method and the path of a binding."""
    verb = rule.WhichOneof("pattern")
    return verb.upper(), getattr(rule, verb)


def rest_path(path: str) -> str:
    """Returns a path with plain placeholders: `/v1/accounts/{account}/lots` for `/v1/{parent=accounts/*}/lots`."""
    path = re.sub(r"\{[a-z_.]+=([^}]*)\}", r"\1", path)
    path = re.sub(r"(\w+)s/\*", r"\1s/{\1}", path)
    return re.sub(r"\{(\w+)\}", lambda match: f"{{{re.sub(r'_(.)', lambda part: part[1].upper(), match[1])}}}", path)


def alerts() -> str:
    """Returns a table of the alert rules for Prometheus."""
    groups = yaml.safe_load((ROOT / "docs/deploy/alerts.yaml").read_text())["groups"]
    rows = [
        (f"[{rule['alert']}](#{rule['alert'].lower()})", rule["labels"]["severity"], rule["for"], f"`{rule['expr']}`")
        for group in groups
        for rule in group["rules"]
    ]
    return table(("alert", "severity", "for", "condition"), rows)


BLOCKS: Mapping[str, Callable[[], str]] = {
    "settings": settings,
    "alerts": alerts,
    "limits": limits,
    "metrics": metrics,
    "commands": commands,
    "reasons": reasons,
    "methods": methods,
}


def pages() -> list[Path]:
    """Returns the pages of the documentation."""
    return sorted((ROOT / "docs").rglob("*.md"))


def generated(text: str) -> str:
    """Returns a page with generated blocks. Raises KeyError if a block has an unknown name."""
    return BLOCK.sub(lambda match: f"{match[1]}\n{BLOCKS[match[2]]()}\n{match[3]}", text)


def main() -> None:
    """Writes the generated blocks of every page."""
    for page in pages():
        text = page.read_text()
        fresh = generated(text)
        if fresh != text:
            page.write_text(fresh)


if __name__ == "__main__":
    main()
