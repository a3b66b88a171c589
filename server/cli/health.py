"""The command that asks a running server whether it serves."""

from __future__ import annotations

from typing import Annotated

import typer

from server.app import CannotStart
from server.cli.options import Host, Port, read_settings
from server.cli.running import run
from server.config import Settings
from server.transport.addresses import host_and_port, reachable
from server.transport.certificates import CertificateFiles, CertificateUnusable, Trust
from server.transport.readiness import is_serving


def health(
    host: Host = None,
    port: Port = None,
    service: Annotated[
        str, typer.Option(help="a service of the contracts, or empty for the process alone")
    ] = "daybook.v1.Ledger",
) -> None:
    """Asks a running server on this machine whether it can answer calls. Exits with 1 if it can't."""
    settings = read_settings(host=host, port=port)

    async def work() -> None:
        address = host_and_port(reachable(settings.host), settings.port)
        if not await is_serving(address, service, _trust(settings)):
            raise CannotStart("not serving")
        typer.echo("serving")

    run(work())


def _trust(settings: Settings) -> Trust | None:
    """How the server is connected to; None if it speaks without TLS. Raises CannotStart, naming the setting."""
    if not settings.tls_certificate_file:
        return None
    if settings.tls_client_ca_file and not settings.gateway_client_certificate_file:
        raise CannotStart(
            "gateway_client_certificate_file is missing: tls_client_ca_file is set, "
            "and the server lets nobody in without a certificate"
        )
    client = CertificateFiles(
        "gateway_client_", settings.gateway_client_certificate_file, settings.gateway_client_key_file
    )
    try:
        return Trust.of(settings.tls_certificate_file, client)
    except CertificateUnusable as error:
        raise CannotStart(str(error)) from None
