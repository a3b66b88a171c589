"""The flags that several commands share, and the settings that result from them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_args

import typer
from pydantic import ValidationError

from server.config import Settings
from server.logs import configure_logs

SERVER = (
    "database_url",
    "host",
    "port",
    "workers",
    "worker_port_base",
    "shutdown_drain_seconds",
    "shutdown_grace_seconds",
    "metrics_host",
    "metrics_port",
    "otlp_endpoint",
    "log_level",
    "log_format",
)
"""The settings of a server that have flags."""

_Command = TypeVar("_Command", bound=Callable[..., None])


def _flag(name: str) -> Any:
    field = Settings.model_fields[name]
    shown = "none" if field.default is None else field.default
    return typer.Option(
        f"--{name.replace('_', '-')}",
        help=f"{field.description} Environment: DAYBOOK_{name.upper()}. Default: {shown}.",
        show_default=False,
    )


DatabaseUrl = Annotated[str | None, _flag("database_url")]
GatewayPort = Annotated[int | None, _flag("gateway_port")]


def with_flags(*names: str) -> Callable[[_Command], _Command]:
    """A decorator that adds a flag for each of these settings to a command, which receives them as `**flags`."""

    def decorate(command: _Command) -> _Command:
        signature = inspect.signature(command, eval_str=True)
        own = (each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD)
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(name))
            for name in Settings.model_fields
            if name in names
        ]
        # Typer derives the flags of a command from its signature.
        command.__signature__ = signature.replace(parameters=[*added, *own])  # type: ignore[attr-defined]  # not declared for every callable
        return command

    return decorate


def _annotation(name: str) -> Any:
    types = get_args(Settings.model_fields[name].annotation) or (Settings.model_fields[name].annotation,)
    return Annotated[next((each for each in (int, float) if each in types), str) | None, _flag(name)]


def read_settings(**flags: object) -> Settings:
    """The settings from the environment, overridden by each flag that isn't None. Exits with 2 if one is invalid."""
    try:
        settings = Settings(**{name: value for name, value in flags.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        for problem in error.errors():
            where = "".join(f"{part}: " for part in problem["loc"])
            typer.echo(f"daybook: {where}{problem['msg'].removeprefix('Value error, ')}", err=True)
        raise typer.Exit(2) from None
    configure_logs(settings)
    return settings
