"""The algorithms with which an issuer may sign access tokens."""

from __future__ import annotations

from collections.abc import Mapping

KEY_TYPES: Mapping[str, str] = {
    "RS256": "RSA",
    "RS384": "RSA",
    "RS512": "RSA",
    "PS256": "RSA",
    "PS384": "RSA",
    "PS512": "RSA",
    "ES256": "EC",
    "ES384": "EC",
    "ES512": "EC",
    "EdDSA": "OKP",
}
"""The type (`kty`) of each algorithm's keys. All are asymmetric: a key that verifies can't sign."""
