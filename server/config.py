"""Settings: from the environment (`DAYBOOK_...`), and from flags, which win."""

from __future__ import annotations

from typing import Literal

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
    tls_certificate_file: str = Field(
        default="", description="the server's certificate, PEM; with it the server speaks TLS"
    )
    tls_key_file: str = Field(default="", description="the private key of that certificate")
    tls_client_ca_file: str = Field(
        default="", description="who signs the certificates of clients; with it nobody gets in without one"
    )
    gateway_tls_certificate_file: str = Field(
        default="", description="the gateway's certificate, PEM; with it `daybook up` lets Envoy speak TLS only"
    )
    gateway_tls_key_file: str = Field(default="", description="the private key of that certificate")
    gateway_server_ca_file: str = Field(default="", description="who signs the certificate of the server, for Envoy")
    gateway_server_name: str = Field(
        default="", description="the name or address in the certificate of the server; else `host`"
    )
    gateway_client_certificate_file: str = Field(
        default="", description="what Envoy shows to a server that asks for the certificates of clients"
    )
    gateway_client_key_file: str = Field(default="", description="the private key of that certificate")
    shutdown_grace_seconds: float = Field(
        default=10.0, ge=0, le=600, description="how long calls under way may take at a stop"
    )
    call_seconds_max: float = Field(
        default=30.0, ge=0.001, le=3600, description="how long a call may take, whatever its caller's deadline is"
    )
    stream_seconds_max: float = Field(default=3600.0, ge=0.001, le=86_400, description="how long a stream may take")
    stream_idle_seconds_max: float = Field(
        default=300.0, ge=0.001, le=86_400, description="how long a stream may wait for its next message"
    )
    handshake_seconds_max: float = Field(
        default=10.0, ge=0.1, le=600, description="how long who connects may take to say what they speak"
    )
    connection_idle_seconds_max: float = Field(
        default=300.0, ge=0.1, le=86_400, description="how long a connection may be open without a call"
    )
    connection_age_seconds_max: float = Field(
        default=3600.0, ge=0.1, le=86_400, description="after how long a connection is asked to be made anew"
    )
    keepalive_seconds: float = Field(
        default=60.0, ge=0.1, le=86_400, description="after how long a silent client is asked whether it is there"
    )
    keepalive_timeout_seconds: float = Field(
        default=20.0, ge=0.1, le=600, description="how long a client may take to say that it is there"
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
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="`debug` logs every call"
    )
    log_format: Literal["console", "json"] = Field(default="console", description="how logs look")

    @field_validator("rate_limit_calls_per_second")
    @classmethod
    def _is_off_or_a_rate(cls, value: float) -> float:
        if 0 < value < CALLS_PER_SECOND_MIN:
            raise ValueError(f"Input should be 0, or at least {CALLS_PER_SECOND_MIN}")
        return value
