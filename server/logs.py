"""Logs: one line per event to stderr, for people or as JSON.

Records that libraries log through the standard library get the same format, but only from
level warning on: below it they log statements with their values. Every line, of Daybook and
of libraries, passes `hide_secrets`.
"""

from __future__ import annotations

import logging
import os
import re
import sys

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from server.config import Settings
from server.transport.call_metadata import call_metadata

LOGGED_ID_CHARACTERS_MAX = 128

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
_FAULTS_OF_CLIENTS = ("Invalid encoding on", "ExecuteBatchError raised in core")
_UNSAFE = re.compile(r"[^!-~]")
_FILE = re.compile(r'File "([^"\n]+)"')
_HIDDEN = "[hidden]"
_SECRETS = (
    # The repr of bytes: input from the wire, in which escapes may split a secret.
    (re.compile(r"""\bb'(?:[^'\\]|\\.)*'|\bb"(?:[^"\\]|\\.)*\""""), _HIDDEN),
    (re.compile(r"\b(bearer|basic|digest)\s+[^\s\"',;]+", re.IGNORECASE), rf"\1 {_HIDDEN}"),
    (
        re.compile(r"\b(authorization|x-api-key|\w*password)([\"']?\s*[=:]\s*)[^\s,;&]+", re.IGNORECASE),
        rf"\1\2{_HIDDEN}",
    ),
    # User and password in a URL.
    (re.compile(r"(://)[^\s\"']*@"), rf"\1{_HIDDEN}@"),
    # Secrets of API keys, page tokens and segments of access tokens: base64url or hexadecimal.
    (re.compile(r"(?<![\w-])(?=[\w-]*[A-Z])[A-Za-z0-9_-]{40,}|\b[0-9a-f]{64}\b"), _HIDDEN),
)


def configure_logs(settings: Settings) -> None:
    """Configures the logs of this process. Call it before gRPC starts."""
    # The C++ core of gRPC writes to stderr by itself, in a format of its own. Any client can make it write
    # any bytes (the text of a GOAWAY frame), without a credential, so it is silent unless the operator asks.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        add_call_ids,
        *_trace_ids(settings),
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderers = _renderers(settings)
    level = logging.getLevelName(settings.log_level.upper())
    structlog.configure(
        processors=[*shared, *renderers],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    handler.addFilter(is_no_fault_of_a_client)
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[handler], force=True)
    logging.captureWarnings(True)


def _renderers(settings: Settings) -> list[Processor]:
    # Plain tracebacks: rich ones take seconds to render and show local variables.
    plain: list[Processor] = [structlog.processors.format_exc_info, hide_folders, hide_secrets]
    if settings.log_format == "json":
        return [*plain, structlog.processors.JSONRenderer(default=repr)]
    formatter = structlog.dev.plain_traceback
    return [*plain, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=formatter)]


def hide_folders(_logger: WrappedLogger, _method: str, line: EventDict) -> EventDict:
    """Shortens the paths in a traceback to their part below the installation folder."""
    if isinstance(text := line.get("exception"), str):
        line["exception"] = _FILE.sub(lambda match: f'File "{_below(match[1])}"', text)
    return line


def hide_secrets(_logger: WrappedLogger, _method: str, line: EventDict) -> EventDict:
    """Replaces credentials, passwords and page tokens in all values of a line.

    Daybook's own code logs none. A library may, in an error message about its input.
    """
    for name, value in line.items():
        line[name] = _hidden_in(value)
    return line


def _hidden_in(value: object) -> object:
    match value:
        case str():
            return without_secrets(value)
        case int() | float() | None:
            return value
        case list() | tuple():
            return [_hidden_in(each) for each in value]
        case dict():
            return {name: _hidden_in(each) for name, each in value.items()}
    return without_secrets(repr(value))


def without_secrets(text: str) -> str:
    """The text with `[hidden]` in place of everything that resembles a secret."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def is_no_fault_of_a_client(record: logging.LogRecord) -> bool:
    """False for gRPC's errors that any client can cause, without a credential; True for every other record.

    They have tracebacks: metadata or a path that is not UTF-8, and an answer to a client that has
    left. The call is logged like any other. A path ends the server of gRPC, and
    server/transport/lasting_server.py logs that.
    """
    if record.name.startswith("grpc"):
        return not (isinstance(record.msg, UnicodeDecodeError) or str(record.msg).startswith(_FAULTS_OF_CLIENTS))
    error = record.exc_info[1] if record.exc_info else None
    return not (record.name == "asyncio" and isinstance(error, UnicodeDecodeError))


def _below(file: str) -> str:
    # The longest match, because the folder of packages is below Python's own.
    fitting = max((folder for folder in sys.path if folder and file.startswith(f"{folder}/")), key=len, default="")
    return file.removeprefix(f"{fitting}/") if fitting else file.rpartition("/")[2]


def _trace_ids(settings: Settings) -> list[Processor]:
    if settings.otlp_endpoint is None:
        return []
    # Loaded only if traces are exported.
    from server.tracing import add_trace_ids  # noqa: PLC0415

    return [add_trace_ids]


def add_call_ids(_logger: WrappedLogger, _method: str, line: EventDict) -> EventDict:
    """Adds the x-request-id and the trace id of the request that a line belongs to.

    Reads the metadata when a line is written, because most calls write none. The caller chooses
    the values, so they are truncated, and blanks and control characters are replaced.
    """
    for name, value in call_metadata.get():
        if not isinstance(value, str):
            continue
        if name == "x-request-id":
            line["request_id"] = _UNSAFE.sub("?", value[:LOGGED_ID_CHARACTERS_MAX])
        elif name == "traceparent" and (named := _TRACEPARENT.fullmatch(value)):
            line["trace_id"] = named[1]
    return line
