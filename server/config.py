"""Settings, from environment variables (`DAYBOOK_...`) and from flags. A flag overrides its variable."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from server.transport.addresses import is_loopback
from server.transport.signing_algorithms import KEY_TYPES
from server.transport.token_keys import parse_token_keys
from server.transport.validation import BATCH_SIZE_MAX, PAGE_SIZE_MAX, TEXT_CHARACTERS_MAX

CALLS_PER_SECOND_MIN = 0.001
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9.-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")


class CannotStart(Exception):
    """The process can't start with these settings. The message is for the operator."""


class Settings(BaseSettings):
    """All settings. Their defaults suit one machine."""

    # An error never repeats the value, which may be a secret.
    model_config = SettingsConfigDict(env_prefix="DAYBOOK_", frozen=True, hide_input_in_errors=True)

    database_url: str = Field(
        default="sqlite+aiosqlite:///daybook.db",
        repr=False,
        description="SQLAlchemy URL of the database.",
    )
    database_replica_url: str = Field(
        default="", repr=False, description="SQLAlchemy URL of a PostgreSQL streaming standby that serves lists."
    )
    token_keys: SecretStr = Field(
        default=SecretStr(""),
        description="Keys that seal page tokens, in hex or base64; they replace the keys in the database.",
    )
    token_keys_file: Path | None = Field(default=None, description="File with the keys that seal page tokens.")
    database_pool_size: int = Field(
        default=6,
        ge=1,
        le=1000,
        description="Number of database connections of one process: on PostgreSQL half for bounded reads, at least 1,"
        " and the rest, at least 2, for transactions and streams; on SQLite for streams.",
    )
    database_pool_wait_seconds: float = Field(
        default=5.0, gt=0, le=600, description="Longest wait of a call for a free database connection, in seconds."
    )
    database_pool_recycle_seconds: float = Field(
        default=1800.0, gt=0, le=86_400, description="Age at which a PostgreSQL connection is replaced, in seconds."
    )
    database_connect_timeout_seconds: float = Field(
        default=5.0, gt=0, le=600, description="Connect timeout of PostgreSQL, in seconds."
    )
    database_lock_timeout_seconds: float = Field(
        default=5.0, gt=0, le=600, description="Longest wait of a statement for another writer's lock, in seconds."
    )
    database_statement_timeout_seconds: float = Field(
        default=30.0,
        ge=0,
        le=86_400,
        description="Statement timeout of PostgreSQL, in seconds; 0 for none.",
    )
    database_idle_transaction_timeout_seconds: float = Field(
        default=60.0,
        gt=0,
        le=86_400,
        description="Idle time after which PostgreSQL ends a transaction and releases its locks, in seconds.",
    )
    database_pooler_mode: Literal["session", "transaction"] = Field(
        default="session",
        description="Pool mode of the PgBouncer in front of PostgreSQL; `session` also without a PgBouncer.",
    )
    database_replica_wait_seconds: float = Field(
        default=0.05,
        ge=0,
        le=2,
        description="Longest wait of a list for the replica to catch up, in seconds; then the primary serves it.",
    )
    clock_skew_seconds: float = Field(
        default=5.0,
        ge=0.1,
        le=86_400,
        description="Largest tolerated clock skew, in seconds; beyond it nothing is posted.",
    )
    host: str = Field(default="127.0.0.1", description="Listen address of the gRPC server.")
    port: int = Field(default=50051, ge=0, le=65535, description="Port of the gRPC server; 0 takes a free port.")
    workers: int = Field(default=1, ge=1, le=64, description="Number of server processes.")
    worker_port_base: int = Field(
        default=50052,
        ge=1,
        le=65535,
        description="Private port of the first of several workers; the others use the next ports.",
    )
    gateway_host: str = Field(default="127.0.0.1", description="Listen address of the gateway.")
    gateway_port: int = Field(default=8080, ge=1, le=65535, description="Port of the gateway.")
    gateway_admin_port: int = Field(
        default=9901, ge=1, le=65535, description="Port of Envoy's admin page, on loopback."
    )
    gateway_metrics_port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="Port of the gateway's metrics page for Prometheus, on the address metrics_host.",
    )
    tls_certificate_file: str = Field(
        default="", description="Certificate of the server, a PEM file; if set, the server speaks TLS."
    )
    tls_key_file: str = Field(default="", description="Private key of the server's certificate, a PEM file.")
    tls_client_ca_file: str = Field(
        default="",
        description="Certificate authorities of clients, a PEM file; if set, clients need a certificate.",
    )
    gateway_tls_certificate_file: str = Field(
        default="",
        description="Certificate of the gateway, a PEM file; if set, the gateway speaks only TLS.",
    )
    gateway_tls_key_file: str = Field(default="", description="Private key of the gateway's certificate, a PEM file.")
    gateway_server_ca_file: str = Field(
        default="", description="Certificate authorities by which Envoy verifies the server, a PEM file."
    )
    gateway_server_name: str = Field(
        default="", description="Name or address in the server's certificate; by default, `host`."
    )
    gateway_client_certificate_file: str = Field(
        default="", description="Client certificate that Envoy presents to the server, a PEM file."
    )
    gateway_client_key_file: str = Field(
        default="", description="Private key of the gateway's client certificate, a PEM file."
    )
    shutdown_drain_seconds: float = Field(
        default=3.0,
        ge=0,
        le=600,
        description="Drain time after SIGTERM, in seconds: the server still takes calls, and load balancers see that"
        " it is not ready. SIGINT skips it.",
    )
    shutdown_grace_seconds: float = Field(
        default=10.0, ge=0, le=600, description="Grace period of running calls at a shutdown, in seconds."
    )
    call_seconds_max: float = Field(
        default=30.0,
        ge=0.001,
        le=3600,
        description="Longest duration of a call, in seconds; a caller's deadline can only be shorter.",
    )
    stream_seconds_max: float = Field(
        default=3600.0, ge=0.001, le=86_400, description="Longest duration of a stream, in seconds."
    )
    stream_idle_seconds_max: float = Field(
        default=300.0, ge=0.001, le=86_400, description="Longest wait of a stream for its next message, in seconds."
    )
    handshake_seconds_max: float = Field(default=10.0, ge=0.1, le=600, description="Handshake timeout, in seconds.")
    connection_idle_seconds_max: float = Field(
        default=300.0,
        ge=0.1,
        le=86_400,
        description="Idle timeout of a connection without calls, in seconds.",
    )
    connection_age_seconds_max: float = Field(
        default=3600.0, ge=0.1, le=86_400, description="Age at which a client is asked to reconnect, in seconds."
    )
    keepalive_seconds: float = Field(
        default=60.0, ge=0.1, le=86_400, description="Idle time after which a client gets a keepalive ping, in seconds."
    )
    keepalive_timeout_seconds: float = Field(
        default=20.0, ge=0.1, le=600, description="Longest wait for the answer to a keepalive ping, in seconds."
    )
    message_bytes_max: int = Field(
        default=4 * 1024 * 1024, ge=1024, le=64 * 1024 * 1024, description="Largest request message, in bytes."
    )
    metadata_bytes_max: int = Field(
        default=32_768,
        # At least what the gateway lets through; gRPC adds 32 bytes for each header.
        ge=24_576,
        le=1024 * 1024,
        description="Metadata size that is always accepted, in bytes; more than twice as much is always refused.",
    )
    text_characters_max: int = Field(
        default=TEXT_CHARACTERS_MAX,
        ge=64,
        le=TEXT_CHARACTERS_MAX,
        description="Maximum length of any text in a request, in characters; a field may have a lower limit.",
    )
    page_size_max: int = Field(
        default=PAGE_SIZE_MAX, ge=1, le=PAGE_SIZE_MAX, description="Maximum number of rows of a native page."
    )
    batch_size_max: int = Field(
        default=BATCH_SIZE_MAX,
        ge=1,
        le=BATCH_SIZE_MAX,
        description="Maximum number of requests in a batch, and of items in one import message.",
    )
    concurrent_streams_max: int = Field(
        default=1000, ge=1, le=100_000, description="Maximum number of concurrent calls on one connection."
    )
    calls_in_flight_max: int = Field(
        default=1000,
        ge=1,
        le=100_000,
        description="Maximum number of concurrent calls in one server process, shared fairly among credentials.",
    )
    streams_in_flight_max: int = Field(
        default=100,
        ge=1,
        le=100_000,
        description="Maximum number of running imports, exports and verifications in a process, shared like calls.",
    )
    admission_seconds_max: float = Field(
        default=1.0, ge=0, le=60, description="Longest wait of a call for admission, in seconds."
    )
    rate_limit_calls_per_second: float = Field(
        default=5000,
        ge=0,
        le=1_000_000,
        allow_inf_nan=False,
        description="Rate limit of one credential at one server process, in calls per second; 0 for none.",
    )
    rate_limit_burst: int = Field(
        default=10_000, ge=1, le=10_000_000, description="Burst of a credential's rate limit, in calls."
    )
    metrics_host: str = Field(default="127.0.0.1", description="Listen address of the metrics pages.")
    metrics_port: int | None = Field(
        default=None, ge=0, le=65535, description="Port of the metrics page for Prometheus; 0 takes a free port."
    )
    otlp_endpoint: str | None = Field(
        default=None, description="Address of the trace collector (OTLP over gRPC), as http://host:port."
    )
    trace_ratio: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Fraction of calls to trace if the caller makes no sampling decision, from 0 to 1.",
    )
    gateway_rate_limit_requests_per_second: int = Field(
        default=10_000,
        ge=0,
        le=1_000_000,
        description="Rate limit of one credential at the gateway, in requests per second; 0 for none.",
    )
    gateway_rate_limit_burst: int = Field(
        default=20_000,
        ge=1,
        le=10_000_000,
        description="Burst of a credential's rate limit at the gateway, in requests.",
    )
    gateway_cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=("*",),
        description="Origins of web pages that may call the API, like https://app.example.com; `*` is any origin.",
    )
    gateway_trusted_proxies: int = Field(
        default=0,
        ge=0,
        le=100,
        description="Number of trusted proxies before the gateway, which set X-Forwarded-For and X-Forwarded-Proto.",
    )
    oauth2_issuer: str = Field(
        default="", description="Issuer of access tokens, as in their `iss`; without it no access token is accepted."
    )
    # The defaults of audience and JWK Set are validated too: with an issuer, both are required.
    oauth2_audience: str = Field(
        default="", validate_default=True, description="Audience of access tokens, as in their `aud`."
    )
    oauth2_jwks: str = Field(
        default="", validate_default=True, description="JWK Set of the issuer: an https URL or a file."
    )
    oauth2_algorithms: Annotated[tuple[str, ...], NoDecode] = Field(
        default=("RS256", "ES256", "EdDSA"), min_length=1, description="Signature algorithms of access tokens."
    )
    oauth2_tenant_claim: str = Field(
        default="tenant", min_length=1, description="Name of the claim with the tenant's slug."
    )
    oauth2_scope_claim: str = Field(default="scope", min_length=1, description="Name of the claim with the scopes.")
    oauth2_account_claim: str = Field(
        default="",
        description="Name of the claim with the account that a token is bound to; the value `-` means all accounts.",
    )
    oauth2_clock_skew_seconds: int = Field(
        default=30,
        ge=0,
        le=300,
        description="Largest tolerated clock skew between the issuer and this machine, in seconds.",
    )
    oauth2_jwks_refresh_seconds: int = Field(
        default=300, ge=10, le=86_400, description="Age at which a JWK Set is fetched again from its URL, in seconds."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Lowest level that is logged; `debug` logs every call."
    )
    log_format: Literal["console", "json"] = Field(default="console", description="Format of log lines.")

    @field_validator("host", "gateway_host", "metrics_host")
    @classmethod
    def _has_no_brackets(cls, value: str) -> str:
        # An IPv6 address has brackets in a URL.
        return value.removeprefix("[").removesuffix("]")

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_an_origin(cls, value: str | None) -> str | None:
        if value is not None and collector_address(value) is None:
            raise ValueError("must be an origin like http://127.0.0.1:4317")
        return value

    @field_validator("token_keys")
    @classmethod
    def _are_token_keys(cls, value: SecretStr) -> SecretStr:
        if value.get_secret_value():
            parse_token_keys(value.get_secret_value())
        return value

    @model_validator(mode="after")
    def _has_token_keys_once(self) -> Settings:
        if self.token_keys_file is not None and self.token_keys.get_secret_value():
            raise ValueError("token_keys and token_keys_file can't both be set: leave one out")
        return self

    def configured_token_keys(self) -> list[bytes] | None:
        """The configured keys for page tokens, the sealing key first; None to use the keys in the database.

        Raises ValueError if the file can't be read or holds no valid keys.
        """
        if self.token_keys_file is None:
            text = self.token_keys.get_secret_value()
            return parse_token_keys(text) if text else None
        try:
            return parse_token_keys(self.token_keys_file.read_text())
        except OSError as error:
            raise ValueError(f"token_keys_file can't be read: {error.strerror}") from None
        except ValueError as error:
            # The message of a UnicodeError repeats the content.
            problem = "must be a text file in UTF-8" if isinstance(error, UnicodeError) else error
            raise ValueError(f"token_keys_file: {problem}") from None

    @field_validator("rate_limit_calls_per_second")
    @classmethod
    def _is_off_or_a_rate(cls, value: float) -> float:
        if 0 < value < CALLS_PER_SECOND_MIN:
            raise ValueError(f"must be 0, or at least {CALLS_PER_SECOND_MIN}")
        return value

    @field_validator("oauth2_algorithms", "gateway_cors_origins", mode="before")
    @classmethod
    def _split_list(cls, value: object) -> object:
        return value.replace(",", " ").split() if isinstance(value, str) else value

    @field_validator("gateway_cors_origins")
    @classmethod
    def _are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for each in value:
            if each != "*" and _ORIGIN.fullmatch(each) is None:
                raise ValueError("must be `*` or origins like https://app.example.com, without a path")
        return value

    @field_validator("oauth2_algorithms")
    @classmethod
    def _are_supported(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not KEY_TYPES.keys() >= set(value):
            raise ValueError(f"must be one or more of {', '.join(KEY_TYPES)}")
        return tuple(dict.fromkeys(value))

    @field_validator("oauth2_audience", "oauth2_jwks")
    @classmethod
    def _is_set_with_issuer(cls, value: str, info: ValidationInfo) -> str:
        if bool(value) != bool(info.data.get("oauth2_issuer")):
            raise ValueError("oauth2_issuer, oauth2_audience and oauth2_jwks are set together: set all or none")
        return value

    @field_validator("oauth2_jwks")
    @classmethod
    def _is_url_or_path(cls, value: str) -> str:
        if "://" not in value:
            return value
        url = urlsplit(value)
        if not value.startswith("https://") and not (value.startswith("http://") and is_loopback(url.hostname or "")):
            raise ValueError("must be an https URL, an http URL on loopback, or the path of a file")
        if not url.hostname or url.username is not None or url.fragment or url.port == 0:
            raise ValueError("must be a URL with a host, and without a user or a fragment")
        return value

    @property
    def uses_tls(self) -> bool:
        """Whether any TLS setting of the server or the gateway is set."""
        return any(
            (
                self.tls_certificate_file,
                self.tls_key_file,
                self.tls_client_ca_file,
                self.gateway_tls_certificate_file,
                self.gateway_tls_key_file,
                self.gateway_server_ca_file,
                self.gateway_client_certificate_file,
                self.gateway_client_key_file,
            )
        )

    @property
    def worker_ports(self) -> list[int]:
        """The private port of each worker; empty if a single process serves."""
        return [] if self.workers == 1 else [self.worker_port_base + number for number in range(self.workers)]

    @model_validator(mode="after")
    def _gives_each_worker_a_port(self) -> Self:
        if self.worker_ports and (self.worker_ports[-1] > 65535 or self.port in self.worker_ports):
            last = self.worker_port_base + self.workers - 1
            raise ValueError(
                f"worker_port_base: the workers would use the ports {self.worker_port_base} to {last}, "
                f"which must not include port {self.port} or exceed 65535"
            )
        return self


def collector_address(endpoint: str) -> tuple[str, int] | None:
    """Host and port of a trace collector; None if the endpoint is not `http://host:port`."""
    try:
        parts = urlsplit(endpoint)
        port = parts.port
    except ValueError:
        return None
    if parts.hostname is None or port is None or endpoint.lower().rstrip("/") != f"http://{parts.netloc.lower()}":
        return None
    return None if "@" in parts.netloc else (parts.hostname, port)
