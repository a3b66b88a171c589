"""Settings: from the environment (`DAYBOOK_...`), and from flags, which win."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from server.transport.addresses import is_loopback
from server.transport.signing_keys import KEY_TYPES
from server.transport.token_keys import parse_token_keys
from server.transport.validation import BATCH_SIZE_MAX, PAGE_SIZE_MAX, TEXT_CHARACTERS_MAX

CALLS_PER_SECOND_MIN = 0.001


class Settings(BaseSettings):
    """Everything that can be set. Each has a default that is right on one machine."""

    # What is wrong is told without what it is: it may be a secret.
    model_config = SettingsConfigDict(env_prefix="DAYBOOK_", frozen=True, hide_input_in_errors=True)

    database_url: str = Field(
        default="sqlite+aiosqlite:///daybook.db",
        repr=False,
        description="where the ledger is kept, as SQLAlchemy writes it",
    )
    database_replica_url: str = Field(
        default="", repr=False, description="a streaming standby of that PostgreSQL, which serves lists"
    )
    token_keys: SecretStr = Field(
        default=SecretStr(""), description="keys for page tokens, instead of those in the database"
    )
    token_keys_file: Path | None = Field(default=None, description="a file that holds them")
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
    database_pooler_mode: Literal["session", "transaction"] = Field(
        default="session",
        description="pool_mode of the PgBouncer in front of PostgreSQL; session also where there is none",
    )
    database_replica_wait_seconds: float = Field(
        default=0.05,
        ge=0,
        le=2,
        description="how long a list waits for the replica to have all that it must show; then the primary serves it",
    )
    clock_skew_seconds: float = Field(
        default=5.0,
        ge=0.1,
        le=86_400,
        description="largest difference between this machine's clock and its reference, in seconds; beyond it "
        "nothing is posted",
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
        default=4 * 1024 * 1024, ge=1024, le=64 * 1024 * 1024, description="the size of a message that a caller sends"
    )
    metadata_bytes_max: int = Field(
        default=32_768,
        # What the gateway lets through, of which gRPC counts 32 bytes more for each header.
        ge=24_576,
        le=1024 * 1024,
        description="the size of a call's metadata that is always let in; twice as much never is",
    )
    text_characters_max: int = Field(
        default=TEXT_CHARACTERS_MAX,
        ge=64,
        le=TEXT_CHARACTERS_MAX,
        description="the longest text of a request, beside the bound that each has by its contract",
    )
    page_size_max: int = Field(default=PAGE_SIZE_MAX, ge=1, le=PAGE_SIZE_MAX, description="rows of a native page")
    batch_size_max: int = Field(
        default=BATCH_SIZE_MAX,
        ge=1,
        le=BATCH_SIZE_MAX,
        description="requests of a batch, items of a message of an import",
    )
    concurrent_streams_max: int = Field(default=1000, ge=1, le=100_000, description="calls under way on one connection")
    calls_under_way_max: int = Field(
        default=1000,
        ge=1,
        le=100_000,
        description="calls under way in one server process; a credential gets at most as many as are free",
    )
    streams_under_way_max: int = Field(
        default=100, ge=1, le=100_000, description="imports and verifications under way, likewise"
    )
    admission_seconds_max: float = Field(
        default=5.0, ge=0, le=60, description="how long a call waits for a place among those under way"
    )
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
    gateway_rate_limit_requests_per_second: int = Field(
        default=10_000,
        ge=0,
        le=1_000_000,
        description="how often all callers together may ask the gateway of `daybook up`; 0 for as often as they like",
    )
    gateway_rate_limit_burst: int = Field(
        default=20_000, ge=1, le=10_000_000, description="how many requests that gateway takes at once after a pause"
    )
    oauth2_issuer: str = Field(
        default="", description="who issues access tokens, as `iss` has it; without it none open"
    )
    # What belongs together is checked also where it was left out.
    oauth2_audience: str = Field(
        default="", validate_default=True, description="for whom access tokens must be meant, as `aud` has it"
    )
    oauth2_jwks: str = Field(
        default="", validate_default=True, description="where the issuer's JWK Set is: an https URL, or a file"
    )
    oauth2_algorithms: Annotated[tuple[str, ...], NoDecode] = Field(
        default=("RS256", "ES256", "EdDSA"), min_length=1, description="by which algorithms access tokens are signed"
    )
    oauth2_tenant_claim: str = Field(default="tenant", min_length=1, description="the claim with the tenant's slug")
    oauth2_scope_claim: str = Field(default="scope", min_length=1, description="the claim with the scopes")
    oauth2_account_claim: str = Field(
        default="", description="the claim with the account to which a token is bound, `-` for all; none if empty"
    )
    oauth2_clock_skew_seconds: int = Field(
        default=30, ge=0, le=300, description="how far the issuer's clock may be from this one"
    )
    oauth2_jwks_refresh_seconds: int = Field(
        default=300, ge=10, le=86_400, description="after how long the JWK Set of a URL is fetched again"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="`debug` logs every call"
    )
    log_format: Literal["console", "json"] = Field(default="console", description="how logs look")

    @field_validator("host", "gateway_host", "metrics_host")
    @classmethod
    def _has_no_brackets(cls, value: str) -> str:
        # As a URL has them around an address of IPv6.
        return value.removeprefix("[").removesuffix("]")

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_an_origin(cls, value: str | None) -> str | None:
        if value is not None and collector_address(value) is None:
            raise ValueError("Input should be like http://127.0.0.1:4317")
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
            raise ValueError("token_keys and token_keys_file can't both be set")
        return self

    def configured_token_keys(self) -> list[bytes] | None:
        """The keys for page tokens that are set, the sealing one first; None where those in the database count.

        Raises ValueError for a file that can't be read or holds something else.
        """
        if self.token_keys_file is None:
            text = self.token_keys.get_secret_value()
            return parse_token_keys(text) if text else None
        try:
            return parse_token_keys(self.token_keys_file.read_text())
        except OSError as error:
            raise ValueError(f"token_keys_file can't be read: {error.strerror}") from None
        except ValueError as error:
            # That of a text that is no UTF-8 would show it.
            problem = "must be a text" if isinstance(error, UnicodeError) else error
            raise ValueError(f"token_keys_file: {problem}") from None

    @field_validator("rate_limit_calls_per_second")
    @classmethod
    def _is_off_or_a_rate(cls, value: float) -> float:
        if 0 < value < CALLS_PER_SECOND_MIN:
            raise ValueError(f"Input should be 0, or at least {CALLS_PER_SECOND_MIN}")
        return value

    @field_validator("oauth2_algorithms", mode="before")
    @classmethod
    def _is_a_list(cls, value: object) -> object:
        return value.replace(",", " ").split() if isinstance(value, str) else value

    @field_validator("oauth2_algorithms")
    @classmethod
    def _are_known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not KEY_TYPES.keys() >= set(value):
            raise ValueError(f"can be {', '.join(KEY_TYPES)}")
        return tuple(dict.fromkeys(value))

    @field_validator("oauth2_audience", "oauth2_jwks")
    @classmethod
    def _comes_with_the_issuer(cls, value: str, info: ValidationInfo) -> str:
        if bool(value) != bool(info.data.get("oauth2_issuer")):
            raise ValueError("oauth2_issuer, oauth2_audience and oauth2_jwks are set together, or none of them")
        return value

    @field_validator("oauth2_jwks")
    @classmethod
    def _is_a_place(cls, value: str) -> str:
        if "://" not in value:
            return value
        url = urlsplit(value)
        if not value.startswith("https://") and not (value.startswith("http://") and is_loopback(url.hostname or "")):
            raise ValueError("must be an https URL, an http URL on loopback, or the path of a file")
        if not url.hostname or url.username is not None or url.fragment or url.port == 0:
            raise ValueError("must be a URL with a host, and without a user or a fragment")
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
