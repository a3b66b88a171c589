"""Settings: from the environment (`DAYBOOK_...`), and from flags, which win."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

CALLS_PER_SECOND_MIN = 0.001


class Settings(BaseSettings):
    """Everything that can be set. Each has a default that is right on one machine."""

    model_config = SettingsConfigDict(env_prefix="DAYBOOK_", frozen=True)

    database_url: str = Field(
        default="sqlite+aiosqlite:///daybook.db", description="where the ledger is kept, as SQLAlchemy writes it"
    )
    database_pool_size: int = Field(
        default=4, ge=1, le=1000, description="connections of one process; of SQLite those that read"
    )
    database_pool_wait_seconds: float = Field(
        default=5.0, gt=0, le=600, description="how long a call waits for a connection that is free"
    )
    database_pool_recycle_seconds: float = Field(
        default=1800.0, gt=0, le=86_400, description="how old a connection of PostgreSQL gets"
    )
    database_connect_timeout_seconds: float = Field(
        default=5.0, gt=0, le=600, description="how long PostgreSQL may take to accept a connection"
    )
    database_lock_timeout_seconds: float = Field(
        default=5.0, gt=0, le=600, description="how long a statement waits for another writer"
    )
    database_statement_timeout_seconds: float = Field(
        default=30.0,
        ge=0,
        le=86_400,
        description="how long a statement may take in PostgreSQL; 0 for as long as it needs",
    )
    database_idle_transaction_timeout_seconds: float = Field(
        default=60.0,
        gt=0,
        le=86_400,
        description="how long a transaction may rest in PostgreSQL, with what it has locked",
    )
    host: str = Field(default="127.0.0.1", description="the address on which the gRPC server listens")
    port: int = Field(default=50051, ge=0, le=65535, description="the port of the gRPC server; 0 takes a free one")
    workers: int = Field(default=1, ge=1, le=64, description="how many processes serve")
    worker_port_base: int = Field(
        default=50052,
        ge=1,
        le=65535,
        description="with several workers, the first one's own port, for the gateway; the next ones follow",
    )
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

    @property
    def worker_ports(self) -> list[int]:
        """The ports that belong to one worker each; none where a single process serves."""
        return [] if self.workers == 1 else [self.worker_port_base + number for number in range(self.workers)]

    @model_validator(mode="after")
    def _gives_each_worker_a_port(self) -> Self:
        if self.worker_ports and (self.worker_ports[-1] > 65535 or self.port in self.worker_ports):
            last = self.worker_port_base + self.workers - 1
            raise ValueError(
                f"worker_port_base: the workers' own ports would be {self.worker_port_base} to {last}, "
                f"which must leave out port {self.port} and end at 65535"
            )
        return self
