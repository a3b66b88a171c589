"""Settings: from the environment (`DAYBOOK_...`), and from flags, which win."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


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
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="`debug` logs every call"
    )
    log_format: Literal["console", "json"] = Field(default="console", description="how logs look")
