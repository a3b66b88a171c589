"""The command that serves gRPC, and REST through Envoy."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from server.cli.options import SERVER, read_settings, with_flags
from server.cli.running import first_of, run, unless, until_stopped
from server.cli.serving import open_ledger, server
from server.config import CannotStart, Settings
from server.gateway.envoy import gateway, require_free_ports
from server.transport.addresses import is_loopback

app = typer.Typer()

DEMO_DATABASE_URL = "sqlite+aiosqlite:///.daybook/demo.db"


@app.command()
@with_flags(*SERVER, "gateway_host", "gateway_port", "gateway_admin_port", "gateway_metrics_port")
def up(
    *,
    with_demo: Annotated[
        bool, typer.Option("--demo", help="Demo data, loaded into an empty database; prints what to try.")
    ] = False,
    **flags: object,
) -> None:
    """Serves gRPC, and REST through Envoy, until SIGINT or SIGTERM."""
    if with_demo:
        flags["database_url"] = flags["database_url"] or DEMO_DATABASE_URL
    settings = read_settings(**flags)

    async def work() -> None:
        _require_certificates(settings)
        require_free_ports(settings)
        if with_demo:
            # Loaded only for the demo.
            from server.demo.load import load  # noqa: PLC0415

            await load(settings.database_url)
        async with until_stopped() as stopped, contextlib.AsyncExitStack() as stack:
            book = await unless(stopped, stack.enter_async_context(open_ledger(settings)))
            if book is None:
                return
            if await book.credentials.has_demo_tenant() and not is_loopback(settings.gateway_host):
                raise CannotStart(
                    "the database holds demo data, which is served on loopback only: set gateway_host to 127.0.0.1"
                )
            async with gateway(settings) as envoy, server(book, settings, flags, stopped) as ended:
                await first_of(envoy.ready(), ended(), stopped.wait())
                if with_demo and not stopped.is_set():
                    _print_what_to_try(settings)
                await first_of(stopped.wait(), ended(), envoy.process.wait())
                if not stopped.is_set():
                    raise CannotStart("the gateway ended by itself; its message is above")

    run(work())


def _require_certificates(settings: Settings) -> None:
    if settings.uses_tls:
        # Loaded only for TLS.
        from server.tls import require_certificates  # noqa: PLC0415

        require_certificates(settings)


def _print_what_to_try(settings: Settings) -> None:
    # Loaded only for the demo.
    from server.demo.guide import Gateway, what_to_try  # noqa: PLC0415

    gateway = Gateway(settings.gateway_port, settings.gateway_host, settings.gateway_tls_certificate_file)
    typer.echo(what_to_try(gateway))
