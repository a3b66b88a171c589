"""The command that asks a running server for its health."""

from __future__ import annotations

from typing import Annotated

import typer

from server.cli.options import read_settings, with_flags
from server.cli.running import run
from server.config import CannotStart
from server.transport.addresses import host_and_port, reachable
from server.transport.readiness import is_serving

app = typer.Typer()


@app.command()
@with_flags("host", "port")
def health(
    *,
    service: Annotated[
        str, typer.Option(help="Full name of the service to check, by default daybook.v1.Ledger; empty for liveness.")
    ] = "daybook.v1.Ledger",
    **flags: object,
) -> None:
    """Checks whether the server on this machine can answer calls. Exits with 1 if not."""
    settings = read_settings(**flags)

    async def work() -> None:
        trust = None
        if settings.uses_tls:
            # Loaded only for TLS.
            from server.tls import client_trust  # noqa: PLC0415

            trust = client_trust(settings)
        if not await is_serving(host_and_port(reachable(settings.host), settings.port), service, trust):
            raise CannotStart("not serving")
        typer.echo("serving")

    run(work())
