"""The command that writes the files of a gateway that runs elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from server.cli.options import read_settings, with_flags
from server.cli.running import failing_in_one_line
from server.gateway.configuration import write_deployment

app = typer.Typer()


def _read_server(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"([A-Za-z0-9_.-]+|\[[0-9a-fA-F:.]+\]):([0-9]{1,5})", text, re.ASCII)
    if match is None or not 1 <= int(match[2]) <= 65535:
        raise typer.BadParameter("must be a name or an address, a colon and a port, like server-1:50051")
    return match[1].strip("[]"), int(match[2])


@app.command()
@with_flags(
    "gateway_host", "gateway_port", "gateway_admin_port", "gateway_metrics_port", "metrics_host", "otlp_endpoint"
)
def gateway_config(
    *,
    folder: Annotated[Path, typer.Argument(help="Folder of the files; the gateway must find it under the same path.")],
    server: Annotated[list[str], typer.Option(help="Name or address, and port, of a server; may be repeated.")],
    **flags: object,
) -> None:
    """Writes envoy.yaml and the files that it names, for a gateway that runs elsewhere.

    Uses the gateway's settings: addresses, certificates, the rate limit and traces. The gateway
    listens on every address unless gateway_host is set.
    """
    servers = [_read_server(each) for each in server]
    with failing_in_one_line():
        write_deployment(read_settings(**flags), folder, servers)
    typer.echo(f"wrote {folder / 'envoy.yaml'}")
