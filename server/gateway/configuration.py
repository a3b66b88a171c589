"""Envoy's configuration, rendered from the template, the contracts, the vendors' tables and the settings.

`python -m server.gateway.configuration` writes envoy.yaml, as `make gen` does.
"""

from __future__ import annotations

import ipaddress
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from jinja2 import Environment, StrictUndefined

from server.config import CannotStart, Settings, collector_address
from server.gateway.contracts import DESCRIPTORS, read_contracts
from server.gateway.files import CONTENT_TYPES, SITE, SWAGGER_UI, SWAGGER_UI_PATH, copy_site, read_site
from server.transport.addresses import reachable, resolved
from server.vendors import all_vendors
from server.vendors.vendor import MESSAGES

Address: TypeAlias = tuple[str, int]
"""A host and a port."""

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
_REQUEST_BYTES = 1_048_576
"""Largest body of a REST request, in bytes."""
_ANY_HOST = "0.0.0.0"  # noqa: S104  # inside a container, or behind a firewall
_TLS_TYPES = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3"
_NEEDED_ELSEWHERE = (
    ("gateway_tls_certificate_file", "gateway_tls_key_file"),
    ("gateway_tls_key_file", "gateway_tls_certificate_file"),
    ("gateway_client_certificate_file", "gateway_client_key_file"),
    ("gateway_client_key_file", "gateway_client_certificate_file"),
    ("gateway_client_certificate_file", "gateway_server_ca_file"),
    # The name in the servers' certificates.
    ("gateway_server_ca_file", "gateway_server_name"),
)
"""Settings of a gateway that runs elsewhere, each with another setting that it needs."""


@dataclass(frozen=True, slots=True)
class Listener:
    """A listener of the gateway."""

    name: str
    host: str
    port: int
    secret: str = ""
    """The file with the SDS resource of its certificate; empty without TLS."""


@dataclass(frozen=True, slots=True)
class Gateway:
    """The parameters of the template."""

    listeners: Sequence[Listener]
    servers: Sequence[Address]
    descriptors: str
    """The file with the descriptor set."""
    site: str
    """The folder with the files that the gateway serves."""
    swagger_ui: str
    """The folder with the files of Swagger UI; empty if they are in the other folder, or not served."""
    admin_port: int
    rate_limit_requests_per_second: int
    rate_limit_burst: int
    request_bytes_max: int
    cors_origins: Sequence[str]
    """Origins of web pages that may call the API; `*` is any."""
    trusted_proxies: int
    resolves_names: bool = False
    """Whether the hosts of the servers are names, which Envoy resolves periodically."""
    server_secret: str = ""
    """The file with the SDS resource by which Envoy verifies the servers; empty without TLS to them."""
    client_secret: str = ""
    """The file with the SDS resource of the certificate that Envoy presents to the servers, or empty."""
    collector: Address | None = None
    """The trace collector."""
    trace_ratio: float = 0
    metrics: Address | None = None
    """The listen address of the metrics page."""


def render(gateway: Gateway) -> str:
    """The configuration as YAML."""
    environment = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701  # not HTML; the filter json escapes settings
    )
    environment.filters["json"] = partial(json.dumps, ensure_ascii=False)
    template = environment.from_string((FOLDER / "template.yaml").read_text())
    return template.render(
        gateway=gateway,
        contracts=read_contracts(),
        content_types=CONTENT_TYPES,
        site=read_site(),
        swagger_ui_path=SWAGGER_UI_PATH,
        vendors=all_vendors(),
        messages=MESSAGES,
        lua=lambda name: (FOLDER / "lua" / name).read_text().rstrip(),
        lua_set=_lua_set,
    )


def _lua_set(names: Iterable[str]) -> str:
    return "{" + ", ".join(f'["{name}"] = true' for name in sorted(names)) + "}"


def committed() -> Gateway:
    """The gateway of envoy.yaml: every address, with and without TLS, in front of a server on this machine."""
    settings = Settings.model_construct()
    return _gateway(
        settings,
        listeners=[
            Listener("gateway", _ANY_HOST, settings.gateway_port),
            Listener("gateway_tls", _ANY_HOST, 8443, "server/gateway/tls.yaml"),
        ],
        servers=[("127.0.0.1", settings.port)],
        descriptors=str(DESCRIPTORS.resolve().relative_to(ROOT)),
        site=str(SITE.relative_to(ROOT)),
        # The path of a package differs from machine to machine.
        swagger_ui="",
    )


def of_settings(settings: Settings, secrets: Path = Path()) -> Gateway:
    """The gateway of `daybook up`. The files of `write_secrets` must be in the folder before Envoy starts."""
    host = resolved(reachable(settings.host))
    return _gateway(
        settings,
        listeners=[_listener(settings, resolved(settings.gateway_host), secrets)],
        servers=[(host, port) for port in settings.worker_ports or [settings.port]],
        descriptors=str(DESCRIPTORS),
        site=str(SITE),
        swagger_ui=str(SWAGGER_UI),
        secrets=secrets,
    )


def write_deployment(settings: Settings, folder: Path, servers: Sequence[Address]) -> None:
    """Writes envoy.yaml and the files that it names, for a gateway that runs elsewhere.

    `servers` have names or addresses. The gateway must find the folder under the same path, and
    the certificates under the paths of the settings. It listens on every address unless
    gateway_host is set. Raises CannotStart, naming the setting, if a setting lacks another that
    it needs, or if gateway_host, or the metrics_host of its metrics page, is a name.
    """
    for given, needed in _NEEDED_ELSEWHERE:
        if getattr(settings, given) and not getattr(settings, needed):
            raise CannotStart(f"{needed} is missing: {given} is set")
    host = settings.gateway_host if "gateway_host" in settings.model_fields_set else _ANY_HOST
    for name, address in (("gateway_host", host), ("metrics_host", settings.metrics_host)):
        if not _is_ip_address(address) and (name == "gateway_host" or settings.gateway_metrics_port):
            raise CannotStart(f"{name} must be an IP address for a gateway that runs elsewhere")
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    descriptors = folder / DESCRIPTORS.name
    shutil.copyfile(DESCRIPTORS, descriptors)
    copy_site(folder / SITE.name)
    write_secrets(settings, folder)
    gateway = _gateway(
        settings,
        listeners=[_listener(settings, host, folder)],
        servers=servers,
        descriptors=str(descriptors),
        site=str(folder / SITE.name),
        swagger_ui="",
        secrets=folder,
        resolves_names=True,
    )
    (folder / "envoy.yaml").write_text(render(gateway), encoding="utf-8")


def _gateway(
    settings: Settings,
    *,
    listeners: Sequence[Listener],
    servers: Sequence[Address],
    descriptors: str,
    site: str,
    swagger_ui: str,
    secrets: Path = Path(),
    resolves_names: bool = False,
) -> Gateway:
    return Gateway(
        listeners=listeners,
        servers=servers,
        descriptors=descriptors,
        site=site,
        swagger_ui=swagger_ui,
        admin_port=settings.gateway_admin_port,
        rate_limit_requests_per_second=settings.gateway_rate_limit_requests_per_second,
        rate_limit_burst=settings.gateway_rate_limit_burst,
        # The gateway refuses a body that is too large for the server with 413.
        request_bytes_max=min(_REQUEST_BYTES, settings.message_bytes_max),
        cors_origins=settings.gateway_cors_origins,
        trusted_proxies=settings.gateway_trusted_proxies,
        resolves_names=resolves_names,
        server_secret=str(secrets / "server.yaml") if settings.gateway_server_ca_file else "",
        client_secret=str(secrets / "client.yaml") if settings.gateway_client_certificate_file else "",
        collector=collector_address(settings.otlp_endpoint) if settings.otlp_endpoint else None,
        trace_ratio=settings.trace_ratio,
        metrics=(resolved(settings.metrics_host), settings.gateway_metrics_port)
        if settings.gateway_metrics_port
        else None,
    )


def _listener(settings: Settings, host: str, secrets: Path) -> Listener:
    """The only listener. With a certificate it serves only TLS."""
    if settings.gateway_tls_certificate_file:
        return Listener("gateway_tls", host, settings.gateway_port, str(secrets / "gateway.yaml"))
    return Listener("gateway", host, settings.gateway_port)


def write_secrets(settings: Settings, folder: Path) -> None:
    """Writes a file for each SDS resource, which names the files of a certificate and its key."""
    for name, secret in _secrets(settings).items():
        resource = {"@type": f"{_TLS_TYPES}.Secret", "name": name, **secret}
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(
            json.dumps({"resources": [resource]}, ensure_ascii=False), encoding="utf-8"
        )


def _secrets(settings: Settings) -> dict[str, dict[str, Any]]:
    secrets: dict[str, dict[str, Any]] = {}
    if settings.gateway_tls_certificate_file:
        secrets["gateway"] = _pair(settings.gateway_tls_certificate_file, settings.gateway_tls_key_file)
    if settings.gateway_client_certificate_file:
        secrets["client"] = _pair(settings.gateway_client_certificate_file, settings.gateway_client_key_file)
    if settings.gateway_server_ca_file:
        name = server_name(settings)
        secrets["server"] = {
            "validation_context": {
                "trusted_ca": {"filename": str(Path(settings.gateway_server_ca_file).absolute())},
                "watched_directory": _watched(settings.gateway_server_ca_file),
                "match_typed_subject_alt_names": [
                    {"san_type": "IP_ADDRESS" if _is_ip_address(name) else "DNS", "matcher": {"exact": name}}
                ],
            }
        }
    return secrets


def _pair(certificate_file: str, key_file: str) -> dict[str, Any]:
    return {
        "tls_certificate": {
            "certificate_chain": {"filename": str(Path(certificate_file).absolute())},
            "private_key": {"filename": str(Path(key_file).absolute())},
            # Envoy reloads certificates when their folder changes.
            "watched_directory": _watched(certificate_file),
        }
    }


def _watched(file: str) -> dict[str, str]:
    return {"path": str(Path(file).absolute().parent)}


def server_name(settings: Settings) -> str:
    """The name or address that the server's certificate must have."""
    return settings.gateway_server_name or settings.host


def _is_ip_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def main() -> None:
    """Writes envoy.yaml."""
    (ROOT / "envoy.yaml").write_text(render(committed()))


if __name__ == "__main__":
    main()
