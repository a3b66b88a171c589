"""Addresses: their format, loopback addresses, and errors when listening."""

from __future__ import annotations

import socket

import pytest

from server.config import Settings
from server.transport.addresses import (
    NO_PROXY,
    AddressUnusable,
    bound,
    host_and_port,
    is_loopback,
    proxy_options,
    reachable,
    resolved,
)


@pytest.mark.parametrize(
    ("host", "written"),
    [("127.0.0.1", "127.0.0.1:80"), ("::1", "[::1]:80"), ("::", "[::]:80"), ("server-1", "server-1:80")],
)
def test_ipv6_has_brackets(host: str, written: str) -> None:
    """An IPv6 address is written in brackets before its port."""
    assert host_and_port(host, 80) == written


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "::ffff:127.0.0.1", "localhost"])
def test_loopback_bypasses_proxies(host: str) -> None:
    """A loopback address is recognized, and is reached without a proxy."""
    assert is_loopback(host)
    assert proxy_options(host) == NO_PROXY


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1", "example.com", ""])  # noqa: S104  # what is tested
def test_other_addresses_may_use_proxies(host: str) -> None:
    """Any other address is not loopback, and may be reached through a proxy."""
    assert not is_loopback(host)
    assert proxy_options(host) == ()


def test_wildcard_address_is_reached_on_loopback() -> None:
    """A server that listens on all addresses is reached on loopback."""
    assert [reachable(host) for host in ("0.0.0.0", "::", "::1", "server-1")] == [  # noqa: S104  # what is tested
        *("127.0.0.1", "::1", "::1", "server-1")
    ]


def test_name_resolves_to_ipv4_first() -> None:
    """An address is unchanged; a name with an IPv4 and an IPv6 address resolves to the IPv4 address."""
    assert [resolved(host) for host in ("127.0.0.1", "::1", "::", "localhost")] == [
        *("127.0.0.1", "::1", "::", "127.0.0.1")
    ]


@pytest.mark.parametrize("name", ["host", "gateway_host", "metrics_host"])
def test_setting_may_have_brackets(name: str) -> None:
    """A setting accepts an IPv6 address in brackets, as in a URL."""
    assert getattr(Settings(**{name: "[::1]"}), name) == "::1"  # type: ignore[arg-type]


def test_bound_address_is_reported_as_taken() -> None:
    """A second bind to a bound address fails, and the error says that the port is taken."""
    with bound("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        held.listen()
        with (
            pytest.raises(AddressUnusable, match=rf"127\.0\.0\.1:{port} for metrics: the port is taken"),
            bound("127.0.0.1", port, "metrics"),
        ):
            raise AssertionError("bound twice")
    with bound("127.0.0.1", port):
        pass


def test_ipv6_wildcard_includes_ipv4() -> None:
    """A socket bound to `::` also accepts IPv4, regardless of the system's default."""
    with bound("::", 0) as held:
        assert held.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 0


@pytest.mark.parametrize(
    ("host", "port", "reason"),
    [
        ("no-such-host.invalid", 80, "no-such-host.invalid:80: Name or service not known"),
        ("192.0.2.1", 8080, r"192\.0\.2\.1:8080: Cannot assign requested address"),
    ],
)
def test_unusable_address_is_reported(host: str, port: int, reason: str) -> None:
    """The error for an unknown or foreign address has the reason of the operating system."""
    with pytest.raises(AddressUnusable, match=reason), bound(host, port):
        raise AssertionError("bound nevertheless")
