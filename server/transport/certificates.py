"""The server's certificate: read from files, and read again when they change.

New connections get a renewed certificate; open connections keep theirs. Unusable files are
logged once, and the previous certificate stays in use.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import grpc
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import NameOID

log = structlog.get_logger(__name__)

_Stamp: TypeAlias = "Sequence[tuple[int, int, int] | None]"


class CertificateUnusable(Exception):
    """Certificate files can't be used. The message names the setting, and never contains their content."""


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """A certificate, its key, and the authorities of client certificates, if clients need one."""

    prefix: str
    """The prefix of the names of the settings, for messages."""
    certificate_file: str
    key_file: str
    client_ca_file: str = ""

    def require_complete(self) -> None:
        """Raises CertificateUnusable, naming the missing setting, if a setting lacks another that it needs."""
        if self.certificate_file and not self.key_file:
            raise CertificateUnusable(f"{self.prefix}key_file is missing: {self.prefix}certificate_file is set")
        if self.key_file and not self.certificate_file:
            raise CertificateUnusable(f"{self.prefix}certificate_file is missing: {self.prefix}key_file is set")
        if self.client_ca_file and not self.certificate_file:
            raise CertificateUnusable(f"{self.prefix}certificate_file is missing: {self.prefix}client_ca_file is set")

    def read(self) -> grpc.ServerCertificateConfiguration:
        """Reads the files. Raises CertificateUnusable if a server can't use them."""
        chain = _read(f"{self.prefix}certificate_file", self.certificate_file)
        key = _read(f"{self.prefix}key_file", self.key_file)
        _require_pair(self.prefix, chain, key)
        authorities = None
        if self.client_ca_file:
            authorities = read_authorities(f"{self.prefix}client_ca_file", self.client_ca_file)
        return grpc.ssl_server_certificate_configuration([(key, chain)], authorities)

    def stamp(self) -> _Stamp:
        """A value that changes whenever a file is written."""
        return [_stamp(file) for file in (self.certificate_file, self.key_file, self.client_ca_file) if file]


class ServerCertificates:
    """The certificate that the server presents at each handshake: the current content of the files."""

    def __init__(self, files: CertificateFiles) -> None:
        """Raises CertificateUnusable if the files can't be used."""
        self._files = files
        self._lock = threading.Lock()
        # Taken before the files are read, so that a write in between counts as a change.
        self._stamp = files.stamp()
        self._initial = files.read()

    def credentials(self) -> grpc.ServerCredentials:
        """The credentials for the port of a server."""
        return grpc.dynamic_ssl_server_credentials(
            self._initial,
            self._fetch,  # type: ignore[arg-type]  # None keeps the certificate
            require_client_authentication=bool(self._files.client_ca_file),
        )

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """The new certificate; None if it hasn't changed. gRPC calls this before each handshake, in its own threads."""
        with self._lock:
            stamp = self._files.stamp()
            if stamp == self._stamp:
                return None
            self._stamp = stamp
            try:
                changed = self._files.read()
            except CertificateUnusable as error:
                log.warning("certificate reload failed", problem=str(error))
                return None
            log.info("certificate reloaded")
            return changed


@dataclass(frozen=True, slots=True)
class Trust:
    """The credentials of a client on the server's machine, which trusts exactly the server's certificate."""

    credentials: grpc.ChannelCredentials
    name_option: tuple[str, str]
    """Makes gRPC verify a name in the certificate, because the client connects to an address."""

    @classmethod
    def of(cls, certificate_file: str, client: CertificateFiles) -> Trust:
        """Trusts the certificate in a file, and presents the client's if there is one. Raises CertificateUnusable."""
        content = _read("tls_certificate_file", certificate_file)
        name = _name_in(_certificates("tls_certificate_file", content)[0])
        client.require_complete()
        chain: bytes | None = None
        key: bytes | None = None
        if client.certificate_file:
            chain = _read(f"{client.prefix}certificate_file", client.certificate_file)
            key = _read(f"{client.prefix}key_file", client.key_file)
            _require_pair(client.prefix, chain, key)
        return cls(grpc.ssl_channel_credentials(content, key, chain), ("grpc.ssl_target_name_override", name))


def _name_in(certificate: x509.Certificate) -> str:
    """A host name or an address of a certificate."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = x509.SubjectAlternativeName([])
    found = [
        *names.get_values_for_type(x509.DNSName),
        *map(str, names.get_values_for_type(x509.IPAddress)),
        *(str(each.value) for each in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)),
    ]
    # Any name matches a wildcard.
    return found[0].replace("*", "server") if found else "localhost"


def read_authorities(setting: str, file: str) -> bytes:
    """The PEM certificates of authorities. Raises CertificateUnusable."""
    content = _read(setting, file)
    _certificates(setting, content)
    return content


def _read(setting: str, file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        raise CertificateUnusable(f"{setting} can't be read ({reason}): {file!r}") from None


def _certificates(setting: str, content: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError:
        raise CertificateUnusable(f"{setting} must hold a certificate in PEM") from None


def _require_pair(prefix: str, chain: bytes, key: bytes) -> None:
    certificate = _certificates(f"{prefix}certificate_file", chain)[0]
    try:
        public_key = load_pem_private_key(key, password=None).public_key()
    except TypeError:
        raise CertificateUnusable(f"{prefix}key_file must not be encrypted with a password") from None
    except Exception:
        # There are several exceptions, whose messages might contain parts of the file.
        raise CertificateUnusable(f"{prefix}key_file must hold a private key in PEM") from None
    shape = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if certificate.public_key().public_bytes(*shape) != public_key.public_bytes(*shape):
        raise CertificateUnusable(
            f"{prefix}key_file is not the key of the first certificate of {prefix}certificate_file"
        )


def _stamp(file: str) -> tuple[int, int, int] | None:
    try:
        status = Path(file).stat()
    except (OSError, ValueError):
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
