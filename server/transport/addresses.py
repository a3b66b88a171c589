"""Formats, resolves and binds addresses of this machine.

An IPv6 address has brackets only before a port, so only this module joins hosts and ports.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

NO_PROXY = (("grpc.enable_http_proxy", 0),)
"""Channel options for a server on this machine, which a proxy of the environment can't reach."""


class AddressUnusable(Exception):
    """An address can't be bound. The message is for the operator."""


def host_and_port(host: str, port: int) -> str:
    """`host:port`, as in a URL: an IPv6 address has brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether an address is reachable only from this machine."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host == "localhost"
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def reachable(host: str) -> str:
    """The address at which this machine reaches its own listener on a host."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # nothing is bound here


def proxy_options(host: str) -> Sequence[tuple[str, int]]:
    """Channel options for a host: proxies of the environment are used, except for this machine."""
    return NO_PROXY if is_loopback(host) else ()


def resolved(host: str) -> str:
    """The address of a host, IPv4 if it has both. Raises OSError if it has none."""
    return str(_socket_addresses(host, 0)[0][1][0])


@contextmanager
def bound(host: str, port: int, purpose: str = "") -> Iterator[socket.socket]:
    """A TCP socket bound to an address until the end of the block; it doesn't listen.

    `::` means every address of this machine, including IPv4. Raises AddressUnusable, whose
    message has the address, the purpose and the reason.
    """
    held = None
    try:
        family, address = _socket_addresses(host, port)[0]
        held = socket.socket(family, socket.SOCK_STREAM)
        # Otherwise a port stays unusable for a minute after its last use.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        held.bind(address)
    except OSError as error:
        if held is not None:
            held.close()
        suffix = f" for {purpose}" if purpose else ""
        raise AddressUnusable(f"can't listen on {host_and_port(host, port)}{suffix}: {reason_of(error)}") from None
    with held:
        yield held


def reason_of(error: OSError) -> str:
    """The reason of a network error, for the operator."""
    if error.errno == errno.EADDRINUSE:
        return "the port is taken"
    return error.strerror or os.strerror(error.errno or errno.EIO)


def _socket_addresses(host: str, port: int) -> list[tuple[int, Any]]:
    """The families and addresses of a host, IPv4 first."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    addresses = [(int(family), address) for family, _, _, _, address in found]
    return sorted(addresses, key=lambda each: each[0] != socket.AF_INET)
