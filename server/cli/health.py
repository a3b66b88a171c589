"""The command that asks a running server whether it serves."""

from __future__ import annotations

from typing import Annotated

import typer

from server.app import CannotStart
from server.cli.options import Host, Port, read_settings
from server.cli.running import run
from server.gateway import reachable
from server.transport.readiness import is_serving


def health(
    host: Host = None,
    port: Port = None,
    service: Annotated[
        str, typer.Option(help="a service of the contracts, or empty for the process alone")
    ] = "daybook.v1.Ledger",
) -> None:
    """Asks a running server whether it can answer calls. Exits with 1 if it can't."""
    settings = read_settings(host=host, port=port)

    async def work() -> None:
        if not await is_serving(f"{reachable(settings.host)}:{settings.port}", service):
            raise CannotStart("not serving")
        typer.echo("serving")

    run(work())
