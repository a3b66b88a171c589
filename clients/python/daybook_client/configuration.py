"""Where the server is and how to reach it, from arguments or from the environment."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc

VARIABLES = {
    "address": "DAYBOOK_ADDRESS",
    "key": "DAYBOOK_KEY",
    "ca_file": "DAYBOOK_CA_FILE",
    "client_certificate_file": "DAYBOOK_CLIENT_CERTIFICATE_FILE",
    "client_key_file": "DAYBOOK_CLIENT_KEY_FILE",
}
"""The environment variable of each argument."""


@dataclass(frozen=True, slots=True)
class Connection:
    """The address and the credentials of a server."""

    address: str
    """`host:port`, `https://host:port` or `http://host:port`."""
    key: str
    """An API key or an access token."""
    ca_file: str
    """The certificate authorities of the server, a PEM file; empty for the well-known ones."""
    client_certificate_file: str
    """The certificate of this client, a PEM file; empty for none."""
    client_key_file: str

    @classmethod
    def of(cls, **arguments: str | None) -> Connection:
        """Returns a connection from arguments; those that are None are read from the environment.

        Raises ValueError if the address or the key is missing or invalid, or the arguments contradict each other.
        """
        given = {
            each.name: os.environ.get(VARIABLES[each.name], "") if (value := arguments[each.name]) is None else value
            for each in fields(cls)
        }
        for name in ("address", "key"):
            if not given[name]:
                raise ValueError(f"no {name}: pass {name}=..., or set {VARIABLES[name]}")
        if not (given["key"].isascii() and given["key"].isprintable()):
            raise ValueError("the key has characters other than printable ASCII")
        found = cls(**given)
        if bool(found.client_certificate_file) != bool(found.client_key_file):
            raise ValueError("client_certificate_file and client_key_file are set together: set both or none")
        if found._has_files and not found.is_secure:
            raise ValueError("an address with http:// takes no certificates: use https://")
        _ = found.target
        return found

    @property
    def is_secure(self) -> bool:
        """Whether to use TLS. By default, it is used unless the server is on this machine and no file is given."""
        scheme, _, _ = self.address.rpartition("://")
        if scheme:
            return scheme == "https"
        return self._has_files or not _is_loopback(urlsplit(f"//{self.address}").hostname or "")

    @property
    def _has_files(self) -> bool:
        return bool(self.ca_file or self.client_certificate_file)

    @property
    def target(self) -> str:
        """The address without a scheme, for gRPC. Raises ValueError."""
        url = urlsplit(self.address if "://" in self.address else f"//{self.address}")
        if url.scheme not in {"", "http", "https"} or not url.hostname or url.path.strip("/") or url.query:
            raise ValueError(f"{self.address!r} is no address: use host:port, https://host:port or http://host:port")
        if url.port is None and url.scheme != "https":
            raise ValueError(f"{self.address!r} has no port")
        return url.netloc if url.port else f"{url.netloc}:443"

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The credential of each call."""
        return (("authorization", f"Bearer {self.key}"),)

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """The certificates of the channel; None without TLS. Raises OSError if a file can't be read."""
        if not self.is_secure:
            return None
        certificates, key, chain = (
            Path(file).read_bytes() if file else None
            for file in (self.ca_file, self.client_key_file, self.client_certificate_file)
        )
        return grpc.ssl_channel_credentials(certificates, key, chain)


def channel_options(more: Sequence[tuple[str, Any]]) -> Sequence[tuple[str, Any]]:
    """gRPC's options of a channel; `more` overrides them."""
    return [
        ("grpc.primary_user_agent", f"daybook-client/{_version()}"),
        # Faster than gRPC's defaults, so that a retry finds a server that has restarted.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
        *more,
    ]


def _version() -> str:
    try:
        return version("daybook-client")
    except PackageNotFoundError:
        return "unknown"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
