"""Addresses: how they are written, which are this machine's, and what keeps one from being listened on."""

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
    """An address of IPv6 is told apart from its port."""
    assert host_and_port(host, 80) == written


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "::ffff:127.0.0.1", "localhost"])
def test_loopback(host: str) -> None:
    """Only this machine reaches it, so that no proxy does."""
    assert is_loopback(host)
    assert proxy_options(host) == NO_PROXY


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1", "example.com", ""])  # noqa: S104  # what is tested
def test_no_loopback(host: str) -> None:
    """Others may reach it, or it is elsewhere and a proxy may be the way."""
    assert not is_loopback(host)
    assert proxy_options(host) == ()


def test_reachable() -> None:
    """A listener on all addresses is reached on loopback."""
    assert [reachable(host) for host in ("0.0.0.0", "::", "::1", "server-1")] == [  # noqa: S104  # what is tested
        *("127.0.0.1", "::1", "::1", "server-1")
    ]


def test_resolved() -> None:
    """An address stays as it is, and a name that has both is taken for its address of IPv4."""
    assert [resolved(host) for host in ("127.0.0.1", "::1", "::", "localhost")] == [
        *("127.0.0.1", "::1", "::", "127.0.0.1")
    ]


@pytest.mark.parametrize("name", ["host", "gateway_host", "metrics_host"])
def test_setting_may_have_brackets(name: str) -> None:
    """An address may be given as it stands in a URL."""
    assert getattr(Settings(**{name: "[::1]"}), name) == "::1"  # type: ignore[arg-type]


def test_held_address_is_taken() -> None:
    """While an address is held nobody else gets it, and what keeps it is said."""
    with bound("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        held.listen()
        with (
            pytest.raises(AddressUnusable, match=rf"127\.0\.0\.1:{port} for metrics: the port is taken"),
            bound("127.0.0.1", port, "metrics"),
        ):
            raise AssertionError("held twice")
    with bound("127.0.0.1", port):
        pass


def test_all_addresses_are_held() -> None:
    """`::` is every address of IPv4 too, whatever the machine's default is."""
    with bound("::", 0) as held:
        assert held.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 0


@pytest.mark.parametrize(
    ("host", "port", "reason"),
    [
        ("no-such-host.invalid", 80, "no-such-host.invalid:80: Name or service not known"),
        ("192.0.2.1", 8080, r"192\.0\.2\.1:8080: Cannot assign requested address"),
    ],
)
def test_reason_is_told(host: str, port: int, reason: str) -> None:
    """An address that this machine doesn't have is not called taken."""
    with pytest.raises(AddressUnusable, match=reason), bound(host, port):
        raise AssertionError("held all the same")
