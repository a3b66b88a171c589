"""Options that several commands share, and the settings that result from them."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from pydantic import ValidationError

from server.config import Settings
from server.logs import configure_logs


def _option(name: str) -> Any:
    field = Settings.model_fields[name]
    default = "none" if field.default is None else field.default
    return typer.Option(
        f"--{name.replace('_', '-')}",
        help=f"{field.description} Environment: DAYBOOK_{name.upper()}. Default: {default}.",
        show_default=False,
    )


DatabaseUrl = Annotated[str | None, _option("database_url")]
Host = Annotated[str | None, _option("host")]
Port = Annotated[int | None, _option("port")]
WorkerCount = Annotated[int | None, _option("workers")]
WorkerPortBase = Annotated[int | None, _option("worker_port_base")]
GatewayHost = Annotated[str | None, _option("gateway_host")]
GatewayPort = Annotated[int | None, _option("gateway_port")]
GatewayAdminPort = Annotated[int | None, _option("gateway_admin_port")]
ShutdownGraceSeconds = Annotated[float | None, _option("shutdown_grace_seconds")]
MetricsHost = Annotated[str | None, _option("metrics_host")]
MetricsPort = Annotated[int | None, _option("metrics_port")]
OtlpEndpoint = Annotated[str | None, _option("otlp_endpoint")]
LogLevel = Annotated[str | None, _option("log_level")]
LogFormat = Annotated[str | None, _option("log_format")]


def read_settings(**flags: object) -> Settings:
    """The settings of the environment, overridden by the flags that aren't None. Exits with 2 if one is invalid."""
    try:
        settings = Settings(**{name: value for name, value in flags.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        for problem in error.errors():
            where = "".join(f"{part}: " for part in problem["loc"])
            typer.echo(f"daybook: {where}{problem['msg'].removeprefix('Value error, ')}", err=True)
        raise typer.Exit(2) from None
    configure_logs(settings)
    return settings
