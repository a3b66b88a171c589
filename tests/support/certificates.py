"""Certificates for tests, signed by an authority of the tests."""

from __future__ import annotations

import shutil
import socket
import ssl
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

DAY = timedelta(days=1)
SECONDS_MAX = 30.0
OF_THIS_MACHINE = (x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1")))


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key, as files."""

    certificate: Path
    key: Path

    def move_to(self, other: Pair) -> None:
        """Replaces the files of another pair with copies of these, each atomically, the key first."""
        for source, target in ((self.key, other.key), (self.certificate, other.certificate)):
            new = target.with_suffix(".new")
            shutil.copyfile(source, new)
            new.replace(target)

    @property
    def serial(self) -> int:
        """The serial number of the certificate."""
        return x509.load_pem_x509_certificate(self.certificate.read_bytes()).serial_number


class Authority:
    """Signs certificates for this machine, with the extensions that RFC 5280 requires and Python 3.13 verifies."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = generate_private_key(SECP256R1())
        self._name = _name("Test authority")
        self.file = folder / "ca.pem"
        """The authority's own certificate."""
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        builder = _builder(self._name, self._key).add_extension(constraints, critical=True)
        builder = builder.add_extension(_only_signs(), critical=True)
        identifier = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        self._write(self.file, builder.add_extension(identifier, critical=False))

    def issue(self, name: str, names: Sequence[x509.GeneralName] = OF_THIS_MACHINE) -> Pair:
        """Returns a certificate for these names and addresses. Its files and its subject have the name `name`."""
        key = generate_private_key(SECP256R1())
        pair = Pair(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        pair.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        builder = _builder(_name(name), key)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        self._write(pair.certificate, builder)
        return pair

    def _write(self, file: Path, builder: x509.CertificateBuilder) -> None:
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = builder.issuer_name(self._name).add_extension(identifier, critical=False)
        certificate = builder.sign(self._key, SHA256())
        file.write_bytes(certificate.public_bytes(Encoding.PEM))


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _only_signs() -> x509.KeyUsage:
    others = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(key_cert_sign=True, crl_sign=True, **dict.fromkeys(others, False))


def _builder(name: x509.Name, key: EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - DAY)
        .not_valid_after(now + DAY)
    )


def connect(
    port: int, authority: Authority, *, client: Pair | None = None, protocols: tuple[str, ...] = ("h2",)
) -> ssl.SSLSocket:
    """Opens a TLS connection to a port of this machine. The authority must have signed the server's certificate."""
    context = ssl.create_default_context(cafile=str(authority.file))
    context.set_alpn_protocols(protocols)
    if client is not None:
        context.load_cert_chain(client.certificate, client.key)
    return context.wrap_socket(socket.create_connection(("127.0.0.1", port), SECONDS_MAX), server_hostname="localhost")


def served_serial(port: int, authority: Authority, *, client: Pair | None = None) -> int:
    """Returns the serial number of the certificate that a port presents."""
    with connect(port, authority, client=client) as connection:
        found = connection.getpeercert()
        assert found is not None
        return int(str(found["serialNumber"]), 16)


def handshake(port: int, authority: Authority, version: ssl.TLSVersion) -> str | None:
    """Offers only one version of TLS. Returns the negotiated version. Raises ssl.SSLError if it is refused."""
    context = ssl.create_default_context(cafile=str(authority.file))
    context.set_alpn_protocols(["h2"])
    # The default security level does not offer old versions.
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        context.minimum_version = context.maximum_version = version
    with (
        socket.create_connection(("127.0.0.1", port), SECONDS_MAX) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        return secured.version()
