"""Translates the URL of a PostgreSQL database, with libpq's parameters, into the driver's arguments."""

from __future__ import annotations

import getpass
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from sqlalchemy.engine import URL

from server.store.engine import DatabaseLimits, DatabaseUrlInvalid

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "sslnegotiation": ("postgres", "direct"),
    "ssl_min_protocol_version": ("TLSv1.2", "TLSv1.3"),
    "ssl_max_protocol_version": ("TLSv1.2", "TLSv1.3"),
    "target_session_attrs": ("any", "primary", "read-write", "standby", "read-only", "prefer-standby"),
}
_FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl", "passfile")
_NUMBERS = ("port", "connect_timeout")
_TEXTS = ("host", "sslpassword", "application_name", "options")
URL_PARAMETERS = (*_CHOICES, *_FILES, *_NUMBERS, *_TEXTS)
"""The parameters of a URL, with libpq's names and meanings."""


def connect_arguments(url: URL, limits: DatabaseLimits, *, must_be_primary: bool) -> dict[str, Any]:
    """The driver's arguments for each connection. Raises DatabaseUrlInvalid, which names the wrong parameter."""
    _require_user(url)
    parameters = {_parameter_name(name): _single(name, value) for name, value in url.query.items()}
    for name, value in parameters.items():
        _check(name, value)
    connect_seconds = parameters.pop("connect_timeout", None)
    arguments: dict[str, Any] = {
        "user": url.username,
        "password": url.password,
        "host": url.host,
        "port": url.port,
        "database": url.database or None,
        "timeout": float(connect_seconds) if connect_seconds else limits.connect_seconds,
        # The driver passes parameters that it doesn't support to the server: application_name and options.
        "dsn": f"postgresql://?{urlencode({'application_name': 'daybook', **parameters})}",
    }
    if must_be_primary and "target_session_attrs" not in parameters:
        # During a failover a standby may briefly have the primary's address; connections to it would stay there.
        arguments["target_session_attrs"] = "primary"
    return {name: value for name, value in arguments.items() if value is not None}


def _parameter_name(name: str) -> str:
    # asyncpg's own name, which SQLAlchemy's documentation uses.
    name = "sslmode" if name == "ssl" else name
    if name not in URL_PARAMETERS:
        raise DatabaseUrlInvalid(
            f"has an unknown parameter {name!r}; supported are {', '.join(sorted(URL_PARAMETERS))}"
        )
    return name


def _single(name: str, value: str | tuple[str, ...]) -> str:
    if isinstance(value, str):
        return value
    if name != "host":
        raise DatabaseUrlInvalid(f"has the parameter {name} more than once")
    # SQLAlchemy's form for several servers.
    return ",".join(value)


def _check(name: str, value: str) -> None:
    if name in _CHOICES and value not in _CHOICES[name]:
        raise DatabaseUrlInvalid(f"has a wrong value of the parameter {name}; it can be {', '.join(_CHOICES[name])}")
    if name in _NUMBERS and not (value.isascii() and value.isdecimal() and 1 <= int(value[:6]) <= 65535):
        raise DatabaseUrlInvalid(f"has a wrong value of the parameter {name}; it is a number from 1 to 65535")
    if name in _FILES and not Path(value).is_file():
        raise DatabaseUrlInvalid(f"has a parameter {name} that names no file")


def _require_user(url: URL) -> None:
    """Raises DatabaseUrlInvalid if the driver would find no user name."""
    if url.username is None and "user" not in url.query and not os.environ.get("PGUSER"):
        try:
            getpass.getuser()
        except (KeyError, OSError):
            raise DatabaseUrlInvalid(
                "must name a user, like postgresql+asyncpg://daybook@host/database: the process's own user has no name"
            ) from None
