"""Settings: from the environment (`DAYBOOK_...`), and from flags, which win."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from server.transport.signing_keys import KEY_TYPES

CALLS_PER_SECOND_MIN = 0.001


def is_loopback(host: str) -> bool:
    """Whether an address can only be reached from this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


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
