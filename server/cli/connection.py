"""Connects a command to a server as a client, and ends it with an exit status by the kind of error.

The connection comes from one source as a whole, so that the key of one server is not sent to another: the profile of
--profile, else the environment, else the profile `default`.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from daybook_client import Daybook, DaybookError, Retry
from daybook_client.configuration import VARIABLES
from daybook_client.errors import DeadlineExceeded, Unauthenticated, Unavailable
from server.cli.values import printable

ATTEMPTS = 3
TIMEOUT_SECONDS = 30.0
NOT_FOUND, REFUSED, INTERRUPTED = 3, 4, 130
EXIT_STATUSES = {
    "INVALID_ARGUMENT": 2,
    "NOT_FOUND": NOT_FOUND,
    "ALREADY_EXISTS": REFUSED,
    "FAILED_PRECONDITION": REFUSED,
    "ABORTED": REFUSED,
    "UNAVAILABLE": os.EX_TEMPFAIL,
    "RESOURCE_EXHAUSTED": os.EX_TEMPFAIL,
    "DEADLINE_EXCEEDED": os.EX_TEMPFAIL,
    "CANCELLED": os.EX_TEMPFAIL,
    "UNIMPLEMENTED": os.EX_PROTOCOL,
    "UNAUTHENTICATED": os.EX_NOPERM,
    "PERMISSION_DENIED": os.EX_NOPERM,
}
"""The exit status of each gRPC status; 1 for any other. docs/reference/commands.md documents them."""
_PEM_FILES = {"ca_file", "client_certificate_file", "client_key_file"}

Profile = Annotated[
    str | None,
    typer.Option(help="Profile with the address and the key.", show_default=False),
]
Address = Annotated[
    str | None,
    typer.Option(help="Address of the server: host:port, https://host:port or http://host:port.", show_default=False),
]


class Failure(Exception):
    """The command ends with this message for the user and this exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def profiles_file() -> Path:
    """The file with the profiles."""
    return Path(typer.get_app_dir("daybook")) / "profiles.toml"


@contextlib.contextmanager
def connected(profile: str | None, address: str | None) -> Iterator[Daybook]:
    """A client of the server. Turns an error that the user can fix into one line and an exit status."""
    with failing_in_one_line():
        source, settings = _read_settings(profile)
        if address is not None:
            settings = {**settings, "address": address}
        for name in ("address", "key"):
            if not settings.get(name):
                raise Failure(_how_to_set(name, source), 2)
        # Empty texts, so that the client reads nothing from the environment.
        given: dict[str, Any] = {name: settings.get(name, "") for name in VARIABLES}
        try:
            client = Daybook(**given, timeout=TIMEOUT_SECONDS, retry=Retry(attempts_max=ATTEMPTS))
        except ValueError as error:
            raise Failure(f"{source}: {error}", 2) from None
        try:
            with client:
                yield client
        except DaybookError as error:
            error.message = _explained(error, settings["address"], source)
            raise


@contextlib.contextmanager
def failing_in_one_line() -> Iterator[None]:
    """Turns an error that the user can fix into one line and an exit status of docs/reference/commands.md."""
    try:
        yield
    except DaybookError as error:
        advice = getattr(error, "__notes__", ())
        _fail("; ".join([error.message, *advice]), EXIT_STATUSES.get(error.code.name, 1))
    except Failure as error:
        _fail(str(error), error.status)
    except BrokenPipeError:
        # The reader of the output has enough, like `head`.
        raise
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error), 1)
    except ValueError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)


def _fail(words: str, status: int) -> None:
    typer.echo(f"daybook: {printable(' '.join(words.split()))}", err=True)
    raise typer.Exit(status) from None


def _explained(error: DaybookError, address: str, source: str) -> str:
    """The message of an error, or a better one for what gRPC itself reports, with what to do."""
    words = error.message or error.code.name
    match error:
        case Unauthenticated():
            return f"{words}; check the key in {source}"
        case DeadlineExceeded() if not error.reason:
            words = f"{address} did not answer before the deadline"
        case Unavailable() if not error.reason:
            cause = words.rpartition("; last error: ")[2]
            hint = "; use http:// for a server without TLS" if "WRONG_VERSION_NUMBER" in cause else ""
            words = f"{address} can't be reached: {cause}{hint}"
    if error.request_id and EXIT_STATUSES.get(error.code.name) == os.EX_TEMPFAIL:
        words += f"; repeat the command with --request-id {error.request_id}, which takes effect once"
    return words


def _read_settings(profile: str | None) -> tuple[str, Mapping[str, str]]:
    """The name of the source and the settings in it. Raises Failure."""
    variables = {name: os.environ[variable] for name, variable in VARIABLES.items() if os.environ.get(variable)}
    if profile is None and ("address" in variables or "key" in variables):
        return "the environment", variables
    file = profiles_file()
    profiles = _read_profiles(file)
    name = profile or "default"
    if name in profiles:
        return f"profile {name} of {file}", _checked(profiles[name], f"profile {name} of {file}")
    if profile is not None:
        raise Failure(f"there is no profile {profile}; {file} has: {', '.join(profiles) or 'none'}", 2)
    return "the environment", variables


def _read_profiles(file: Path) -> Mapping[str, object]:
    try:
        with file.open("rb") as opened:
            if stat.S_IMODE(os.fstat(opened.fileno()).st_mode) & (stat.S_IRWXG | stat.S_IRWXO):
                raise Failure(f"{file} has keys, and other users may read or change it: run chmod 600 {file}", 2)
            return tomllib.load(opened)
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Failure(f"{file} is no TOML: {error}", 2) from None


def _checked(settings: object, source: str) -> Mapping[str, str]:
    if not isinstance(settings, dict) or not all(isinstance(each, str) for each in settings.values()):
        raise Failure(f"{source} must be a table of texts: {', '.join(VARIABLES)}", 2)
    unknown = settings.keys() - VARIABLES.keys()
    if unknown:
        raise Failure(f"{source} has {', '.join(sorted(unknown))}; the settings are {', '.join(VARIABLES)}", 2)
    return {name: str(Path(text).expanduser()) if name in _PEM_FILES else text for name, text in settings.items()}


def _how_to_set(name: str, source: str) -> str:
    if source != "the environment":
        return f"{source} has no {name}"
    return f"no {name}: set DAYBOOK_ADDRESS and DAYBOOK_KEY, or write a profile to {profiles_file()}"
