"""The certificates that the settings name. Imported only for TLS, because cryptography loads slowly."""

from __future__ import annotations

from server.config import CannotStart, Settings
from server.transport.certificates import (
    CertificateFiles,
    CertificateUnusable,
    ServerCertificates,
    Trust,
    read_authorities,
)


def server_certificates(settings: Settings) -> ServerCertificates | None:
    """The certificates of the server; None if it doesn't speak TLS.

    Raises CannotStart, naming the setting, if one is missing or unusable.
    """
    files = CertificateFiles("tls_", settings.tls_certificate_file, settings.tls_key_file, settings.tls_client_ca_file)
    try:
        files.require_complete()
        return ServerCertificates(files) if files.certificate_file else None
    except CertificateUnusable as error:
        raise CannotStart(str(error)) from None


def require_certificates(settings: Settings) -> None:
    """Checks the certificates that `daybook up` needs. Raises CannotStart, naming the setting."""
    server_certificates(settings)
    gateway = CertificateFiles("gateway_tls_", settings.gateway_tls_certificate_file, settings.gateway_tls_key_file)
    try:
        for files in (gateway, _client_files(settings)):
            files.require_complete()
            if files.certificate_file:
                files.read()
        if settings.gateway_server_ca_file:
            read_authorities("gateway_server_ca_file", settings.gateway_server_ca_file)
    except CertificateUnusable as error:
        raise CannotStart(str(error)) from None
    for one, other in (
        ("tls_certificate_file", "gateway_server_ca_file"),
        ("gateway_server_ca_file", "tls_certificate_file"),
        ("gateway_client_certificate_file", "tls_certificate_file"),
        ("tls_client_ca_file", "gateway_client_certificate_file"),
    ):
        if getattr(settings, one) and not getattr(settings, other):
            raise CannotStart(f"{other} is missing: {one} is set, and the gateway must speak TLS to the server")


def client_trust(settings: Settings) -> Trust | None:
    """The credentials of a client on this machine; None if the server doesn't speak TLS.

    Raises CannotStart, naming the setting.
    """
    if not settings.tls_certificate_file:
        return None
    if settings.tls_client_ca_file and not settings.gateway_client_certificate_file:
        raise CannotStart(
            "gateway_client_certificate_file is missing: tls_client_ca_file is set, "
            "and the server requires client certificates"
        )
    try:
        return Trust.of(settings.tls_certificate_file, _client_files(settings))
    except CertificateUnusable as error:
        raise CannotStart(str(error)) from None


def _client_files(settings: Settings) -> CertificateFiles:
    return CertificateFiles(
        "gateway_client_", settings.gateway_client_certificate_file, settings.gateway_client_key_file
    )
