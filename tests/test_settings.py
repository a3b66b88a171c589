"""Settings: flags override the environment, and invalid settings of access tokens are refused."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from server.cli import options
from server.cli.options import read_settings, with_flags
from server.config import Settings
from tests.support.identity_provider import AUDIENCE, NAME

LOOPBACK = "http://127.0.0.1:9/jwks"


def test_flags_override_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command gets the value of each flag in the type of its setting, including 0 and an empty text."""
    for name, value in (("HOST", "::1"), ("PORT", "7000"), ("METRICS_PORT", "9000"), ("OAUTH2_AUDIENCE", "all")):
        monkeypatch.setenv(f"DAYBOOK_{name}", value)
    # Logging is configured once per process, and pytest has done that.
    monkeypatch.setattr(options, "configure_logs", lambda _settings: None)
    received: list[tuple[dict[str, object], Settings]] = []
    app = typer.Typer()

    @app.command()
    @with_flags("host", "port", "metrics_port", "shutdown_grace_seconds", "oauth2_audience")
    def command(**flags: object) -> None:
        received.append((flags, read_settings(**flags)))

    given = ("--port", "0", "--metrics-port", "0", "--shutdown-grace-seconds", "0.5", "--oauth2-audience", "")
    assert CliRunner().invoke(app, given).exit_code == 0
    ((flags, settings),) = received
    typed = {"port": 0, "metrics_port": 0, "shutdown_grace_seconds": 0.5, "oauth2_audience": ""}
    assert flags == {"host": None, **typed}
    assert {name: getattr(settings, name) for name in flags} == {"host": "::1", **typed}
    assert CliRunner().invoke(app, ("--port", "0.5")).exit_code == 2
    assert CliRunner().invoke(app, ("--shutdown-grace-seconds", "-1")).exit_code == 2


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"oauth2_issuer": NAME}, {"oauth2_audience", "oauth2_jwks"}),
        ({"oauth2_audience": AUDIENCE}, {"oauth2_audience"}),
        ({"oauth2_jwks": LOOPBACK}, {"oauth2_jwks"}),
        ({"oauth2_issuer": NAME, "oauth2_audience": AUDIENCE}, {"oauth2_jwks"}),
        ({"oauth2_issuer": NAME, "oauth2_jwks": LOOPBACK}, {"oauth2_audience"}),
    ],
)
def test_issuer_settings_must_be_set_together(settings: dict[str, str], named: set[str]) -> None:
    """If only some of issuer, audience and keys are set, the error names the missing or superfluous settings."""
    with pytest.raises(ValueError, match="are set together") as refusal:
        Settings(**settings)  # type: ignore[arg-type]
    assert {problem["loc"][0] for problem in refusal.value.errors()} == named  # type: ignore[attr-defined]


GOOD_SETTINGS = {"oauth2_issuer": NAME, "oauth2_audience": AUDIENCE, "oauth2_jwks": LOOPBACK}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("oauth2_jwks", "http://issuer.example/jwks"),
        ("oauth2_jwks", "http://127.0.0.1.evil.example/jwks"),
        ("oauth2_jwks", "http://127.0.0.1@evil.example/jwks"),
        ("oauth2_jwks", "https://user:secret@issuer.example/jwks"),
        ("oauth2_jwks", "https:///jwks"),
        ("oauth2_jwks", "https://issuer.example/jwks#keys"),
        ("oauth2_jwks", "https://issuer.example:99999/jwks"),
        ("oauth2_jwks", "file:///etc/jwks.json"),
        ("oauth2_jwks", "ftp://issuer.example/jwks"),
        ("oauth2_jwks", "data://text/plain,{}"),
        ("oauth2_algorithms", "none"),
        ("oauth2_algorithms", "HS256"),
        ("oauth2_algorithms", "RS256 HS256"),
        ("oauth2_algorithms", "rs256"),
        ("oauth2_algorithms", ""),
        ("oauth2_tenant_claim", ""),
        ("oauth2_scope_claim", ""),
        ("oauth2_clock_skew_seconds", "-1"),
        ("oauth2_clock_skew_seconds", "301"),
        ("oauth2_jwks_refresh_seconds", "9"),
        ("oauth2_jwks_refresh_seconds", "86401"),
        ("gateway_cors_origins", "https://app.example.com/"),
        ("gateway_cors_origins", "https://app.example.com, app.example.com"),
        ("gateway_cors_origins", "https://*.example.com"),
        ("gateway_cors_origins", 'https://a"}]'),
        ("gateway_cors_origins", "https://App.example.com"),
    ],
)
def test_invalid_settings_are_refused(monkeypatch: pytest.MonkeyPatch, setting: str, value: str) -> None:
    """An invalid value is refused, and the error names the setting."""
    monkeypatch.setenv(f"DAYBOOK_{setting.upper()}", value)
    with pytest.raises(ValueError, match=setting):
        Settings(**{name: given for name, given in GOOD_SETTINGS.items() if name != setting})  # type: ignore[arg-type]


@pytest.mark.parametrize("origin", ["https://app.example.com", "http://127.0.0.1:3000", "http://[::1]:3000"])
def test_cors_origin_is_accepted(monkeypatch: pytest.MonkeyPatch, origin: str) -> None:
    """An origin as browsers send it is accepted, including one with an IPv6 address."""
    monkeypatch.setenv("DAYBOOK_GATEWAY_CORS_ORIGINS", origin)
    assert Settings().gateway_cors_origins == (origin,)


@pytest.mark.parametrize(
    ("given", "algorithms"),
    [
        ("ES256", ("ES256",)),
        ("ES256 EdDSA", ("ES256", "EdDSA")),
        ("ES256, EdDSA,RS512", ("ES256", "EdDSA", "RS512")),
        ("ES256 ES256", ("ES256",)),
    ],
)
def test_algorithms_are_a_list(monkeypatch: pytest.MonkeyPatch, given: str, algorithms: tuple[str, ...]) -> None:
    """Algorithms are separated by spaces or commas; duplicates are removed."""
    monkeypatch.setenv("DAYBOOK_OAUTH2_ALGORITHMS", given)
    assert Settings(**GOOD_SETTINGS).oauth2_algorithms == algorithms  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "place",
    ["https://issuer.example/jwks?a=b", "http://localhost:1/", "http://[::1]:8080/x", "/etc/daybook/jwks.json", "jwks"],
)
def test_sources_of_keys_are_accepted(place: str) -> None:
    """Keys may come from an https URL, from loopback, or from a file."""
    assert Settings(**{**GOOD_SETTINGS, "oauth2_jwks": place}).oauth2_jwks == place  # type: ignore[arg-type]


def test_access_tokens_are_disabled_by_default() -> None:
    """By default no issuer is set, and the algorithms are RS256, ES256 and EdDSA."""
    settings = Settings()
    assert (settings.oauth2_issuer, settings.oauth2_audience, settings.oauth2_jwks) == ("", "", "")
    assert settings.oauth2_algorithms == ("RS256", "ES256", "EdDSA")
