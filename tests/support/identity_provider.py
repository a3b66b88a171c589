"""An identity provider for tests: real keys, arbitrary tokens, and a JWK Set served over HTTP on loopback."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeAlias

from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from jwt.algorithms import get_default_algorithms

from server.transport.access_tokens import TokenRules

NAME = "https://issuer.example"
AUDIENCE = "https://daybook.example"

Json: TypeAlias = Mapping[str, Any]
Sign: TypeAlias = Callable[[bytes], bytes]
"""Returns the signature of a token's first two segments."""


@dataclass(frozen=True)
class Key:
    """A key pair with its id and its algorithm."""

    id: str | None
    algorithm: str
    private: Any = field(repr=False)

    @property
    def jwk(self) -> dict[str, Any]:
        """The public key as an issuer publishes it."""
        jwk = get_default_algorithms()[self.algorithm].to_jwk(self.private.public_key(), as_dict=True)
        return {"use": "sig", **({} if self.id is None else {"kid": self.id}), **jwk}

    def sign(self, content: bytes) -> bytes:
        """Returns a signature by the key's algorithm."""
        return get_default_algorithms()[self.algorithm].sign(content, self.private)

    def token(self, claims: Json, **header: object) -> str:
        """Returns a token that this key has signed. Header parameters that are None are omitted."""
        named = {"alg": self.algorithm, "kid": self.id, "typ": "at+jwt", **header}
        return compact({name: value for name, value in named.items() if value is not None}, claims, self.sign)


@cache
def rsa_key(key_id: str | None = "rsa", algorithm: str = "RS256", bits: int = 2048) -> Key:
    """Returns an RSA key, cached by its arguments because generation is slow."""
    return Key(key_id, algorithm, rsa.generate_private_key(65537, bits))


def ec_key(key_id: str | None = "ec", algorithm: str = "ES256") -> Key:
    """Returns a new key on the curve of the algorithm."""
    curves: dict[str, type[ec.SECP256R1 | ec.SECP384R1 | ec.SECP521R1]] = {
        "ES256": ec.SECP256R1,
        "ES384": ec.SECP384R1,
        "ES512": ec.SECP521R1,
    }
    return Key(key_id, algorithm, ec.generate_private_key(curves[algorithm]()))


def ed_key(key_id: str | None = "ed") -> Key:
    """Returns a new Ed25519 key."""
    return Key(key_id, "EdDSA", ed25519.Ed25519PrivateKey.generate())


def ed448_key(key_id: str | None = "ed448") -> Key:
    """Returns a new Ed448 key."""
    return Key(key_id, "EdDSA", ed448.Ed448PrivateKey.generate())


def segment(content: bytes) -> str:
    """Encodes bytes as a segment of a token."""
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


def compact(header: Json | bytes, claims: Json | bytes, sign: Sign) -> str:
    """Returns a token with this header and these claims, which are serialized as JSON unless they are bytes."""
    parts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, claims)]
    content = ".".join(map(segment, parts))
    return f"{content}.{segment(sign(content.encode()))}"


def hmac_with(secret: bytes) -> Sign:
    """Returns a signer for `HS256`: HMAC with SHA-256."""
    return lambda content: hmac.digest(secret, content, hashlib.sha256)


def jwk_set(*keys: Key | Json) -> bytes:
    """Returns a JWK Set with the keys."""
    return json.dumps({"keys": [key.jwk if isinstance(key, Key) else key for key in keys]}).encode()


def rules(**changes: Any) -> TokenRules:
    """Returns rules for tokens of this issuer, with changes."""
    return TokenRules(
        **{
            "issuer": NAME,
            "audience": AUDIENCE,
            "algorithms": ("RS256", "ES256", "EdDSA"),
            "tenant_claim": "tenant",
            "scope_claim": "scope",
            "account_claim": None,
            "clock_skew": 30_000_000,
            **changes,
        }
    )


def claims_at(seconds: int, **changes: Any) -> dict[str, Any]:
    """Returns the claims of a valid token, issued at this second for five minutes. Claims that are None are omitted."""
    claims = {
        "iss": NAME,
        "aud": AUDIENCE,
        "sub": "client-1",
        "iat": seconds,
        "exp": seconds + 300,
        "tenant": "house",
        "scope": "openid transactions.readonly",
        **changes,
    }
    return {name: value for name, value in claims.items() if value is not None}


class Endpoint:
    """Serves a JWK Set over real HTTP, with a response that the test sets."""

    def __init__(self) -> None:
        self.open = threading.Event()
        """Requests wait until it is set."""
        self._ended = threading.Event()
        self.reset()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                endpoint.paths.append(self.path)
                endpoint.open.wait()
                length = {} if endpoint.drips else {"content-length": str(len(endpoint.content))}
                with contextlib.suppress(ConnectionError):
                    self.send_response(endpoint.status)
                    for name, value in {**length, **endpoint.headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(endpoint.content)
                    while endpoint.drips and not endpoint._ended.wait(0.02):
                        self.wfile.write(b" ")

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/jwks.json"

    def reset(self, content: bytes = b"") -> None:
        """Sets the content of the next responses, and forgets the requests so far."""
        self.status = 200
        self.headers: dict[str, str] = {}
        self.content = content
        self.drips = False
        """Whether the response continues endlessly, one byte at a time."""
        self.paths: list[str] = []
        """The paths of all requests so far."""
        self.open.set()

    @property
    def count(self) -> int:
        """The number of requests so far."""
        return len(self.paths)

    @contextlib.contextmanager
    def serving(self) -> Iterator[Endpoint]:
        """Serves until the end of the block."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            self.open.set()
            self._ended.set()
            self._server.shutdown()
            thread.join()
            self._server.server_close()
