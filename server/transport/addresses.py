"""Addresses of this machine: how they are written, reached and bound.

An address of IPv6 has brackets before a port and nowhere else, so this is the only place that
joins a host and a port.
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
"""Options of a channel to a server on this machine, which no proxy of the environment could reach."""


class AddressUnusable(Exception):
    """Why nothing can listen on an address, in words for the operator."""


def host_and_port(host: str, port: int) -> str:
    """`host:port`, as in a URL: an address of IPv6 has brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether an address can only be reached from this machine."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host == "localhost"
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def reachable(host: str) -> str:
    """Where this machine reaches a listener that it has on a host."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # nothing is bound here


def proxy_options(host: str) -> Sequence[tuple[str, int]]:
    """Options of a gRPC channel to a host: the proxies of the environment count, but not for this machine."""
    return NO_PROXY if is_loopback(host) else ()


def resolved(host: str) -> str:
    """The address of a host, that of IPv4 if it has both. Raises OSError if it has none."""
    return str(_places(host, 0)[0][1][0])


@contextmanager
def bound(host: str, port: int, purpose: str = "") -> Iterator[socket.socket]:
    """A TCP socket that holds an address until the end of the block, and doesn't listen.

    `::` holds every address of this machine, those of IPv4 too. Raises AddressUnusable, with
    the address, its purpose if there is one, and the reason.
    """
    held = None
    try:
        family, place = _places(host, port)[0]
        held = socket.socket(family, socket.SOCK_STREAM)
        # As servers do; without it a port counts as taken for a minute after its use.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        held.bind(place)
    except OSError as error:
        if held is not None:
            held.close()
        for_what = f" for {purpose}" if purpose else ""
        raise AddressUnusable(f"can't listen on {host_and_port(host, port)}{for_what}: {reason_of(error)}") from None
    with held:
        yield held


def reason_of(error: OSError) -> str:
    """What an error of the network says, in words for the operator."""
    if error.errno == errno.EADDRINUSE:
        return "the port is taken"
    return error.strerror or os.strerror(error.errno or errno.EIO)


def _places(host: str, port: int) -> list[tuple[int, Any]]:
    """The family and the address of each way to reach a host, those of IPv4 first."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    places = [(int(family), place) for family, _, _, _, place in found]
    return sorted(places, key=lambda each: each[0] != socket.AF_INET)
