"""Settings: from the environment (`DAYBOOK_...`), and from flags, which win."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

CALLS_PER_SECOND_MIN = 0.001


class Settings(BaseSettings):
    """Everything that can be set. Each has a default that is right on one machine."""

    model_config = SettingsConfigDict(env_prefix="DAYBOOK_", frozen=True)

    database_url: str = Field(
        default="sqlite+aiosqlite:///daybook.db", description="where the ledger is kept, as SQLAlchemy writes it"
    )
    host: str = Field(default="127.0.0.1", description="the address on which the gRPC server listens")
    port: int = Field(default=50051, ge=0, le=65535, description="the port of the gRPC server; 0 takes a free one")
    gateway_host: str = Field(default="127.0.0.1", description="the address on which `daybook up` lets Envoy listen")
    gateway_port: int = Field(default=8080, ge=1, le=65535, description="the port of the gateway")
    gateway_admin_port: int = Field(default=9901, ge=1, le=65535, description="Envoy's admin port, on loopback")
    shutdown_grace_seconds: float = Field(
        default=10.0, ge=0, le=600, description="how long calls under way may take at a stop"
    )
    message_bytes_max: int = Field(
        default=4 * 1024 * 1024, ge=1024, le=64 * 1024 * 1024, description="the size of a request or an answer"
    )
    concurrent_streams_max: int = Field(default=1000, ge=1, le=100_000, description="calls under way on one connection")
    rate_limit_calls_per_second: float = Field(
        default=5000,
        ge=0,
        le=1_000_000,
        allow_inf_nan=False,
        description="how often one credential may call one server process; 0 for as often as it likes",
    )
    rate_limit_burst: int = Field(
        default=10_000, ge=1, le=10_000_000, description="how many calls a credential that was idle may make at once"
    )
    metrics_host: str = Field(default="127.0.0.1", description="the address on which metrics are served")
    metrics_port: int | None = Field(
        default=None, ge=0, le=65535, description="the port on which Prometheus finds metrics; 0 takes a free one"
    )
    otlp_endpoint: str | None = Field(
        default=None, description="the collector of traces, http://host:port, which takes OTLP over gRPC"
    )
    trace_ratio: float = Field(
        default=1.0, ge=0, le=1, description="the share of calls that are traced where the caller doesn't say"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="`debug` logs every call"
    )
    log_format: Literal["console", "json"] = Field(default="console", description="how logs look")

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_an_origin(cls, value: str | None) -> str | None:
        if value is not None and collector_address(value) is None:
            raise ValueError("Input should be like http://127.0.0.1:4317")
        return value

    @field_validator("rate_limit_calls_per_second")
    @classmethod
    def _is_off_or_a_rate(cls, value: float) -> float:
        if 0 < value < CALLS_PER_SECOND_MIN:
            raise ValueError(f"Input should be 0, or at least {CALLS_PER_SECOND_MIN}")
        return value


def collector_address(endpoint: str) -> tuple[str, int] | None:
    """Host and port of a collector, or None if the endpoint is no `http://host:port`."""
    try:
        parts = urlsplit(endpoint)
        port = parts.port
    except ValueError:
        return None
    if parts.hostname is None or port is None or endpoint.lower().rstrip("/") != f"http://{parts.netloc.lower()}":
        return None
    return None if "@" in parts.netloc else (parts.hostname, port)
