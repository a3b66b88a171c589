"""What to try with the demo, as commands to paste."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from server.demo import dreadnode, nebulablock, spacebring, teable
from server.demo.load import SECRET
from server.transport.addresses import host_and_port, reachable

LOOPBACK = "127.0.0.1"


def rest_command(
    gateway_port: int, key: str, path: str, *more: str, certificate_file: str = "", gateway_host: str = LOOPBACK
) -> str:
    """A command that asks for a path.

    With a certificate the gateway speaks TLS, and the command trusts it for `localhost`.
    """
    trust = ["--cacert", certificate_file] if certificate_file else []
    url = f"{_origin(gateway_host, gateway_port, certificate_file)}{path}"
    return shlex.join(["curl", "-sS", *trust, "-H", f"Authorization: Bearer {key}", *more, url])


def list_command(
    gateway_port: int, key: str, account_id: str, *, certificate_file: str = "", gateway_host: str = LOOPBACK
) -> str:
    """A command that lists an account's transactions over gRPC; for TLS like `rest_command`."""
    return shlex.join(
        [
            _buf(),
            "curl",
            "--protocol",
            "grpc",
            *(["--cacert", certificate_file] if certificate_file else ["--http2-prior-knowledge"]),
            "-H",
            f"Authorization: Bearer {key}",
            "-d",
            f'{{"parent": "accounts/{account_id}", "pageSize": 2}}',
            f"{_origin(gateway_host, gateway_port, certificate_file)}/daybook.v1.Ledger/ListTransactions",
        ]
    )


def _origin(gateway_host: str, gateway_port: int, certificate_file: str) -> str:
    if certificate_file:
        return f"https://localhost:{gateway_port}"
    return f"http://{host_and_port(reachable(gateway_host), gateway_port)}"


def commands(gateway_port: int, certificate_file: str = "", *, gateway_host: str = LOOPBACK) -> dict[str, str]:
    """A command for each way in, by what it shows."""

    def curl(key_id: str, path: str, *more: str) -> str:
        return rest_command(
            gateway_port,
            f"{key_id}.{SECRET}",
            path,
            *more,
            certificate_file=certificate_file,
            gateway_host=gateway_host,
        )

    return {
        "Teable: what a space consumed": curl(
            teable.KEY, f"/api/space/{teable.SPACE}/billing/credit-history?month={teable.MONTH}&take=3"
        ),
        "Nebula Block: the documented example": curl(
            nebulablock.DOCUMENTED_KEY, "/users/credits/history?limit=2&offset=0"
        ),
        "Spacebring: the transactions of a network": curl(
            spacebring.KEY, "/transactions/credits/v1?limit=2", "-H", f"spacebring-network-id: {spacebring.NETWORK}"
        ),
        "Dreadnode: the transactions of an organization": curl(
            dreadnode.KEY, f"/api/v1/org/{dreadnode.ORGANIZATION}/credits/transactions?limit=3"
        ),
        "Paged: an account's transactions by page number": curl(
            dreadnode.KEY, f"/api/billing/accounts/{dreadnode.ORGANIZATION}/transactions?page=2&page_size=3"
        ),
        "Native REST: the newest transactions": curl(
            dreadnode.KEY, f"/v1/accounts/{dreadnode.ORGANIZATION}/transactions?pageSize=2"
        ),
        "Native gRPC, by reflection": list_command(
            gateway_port,
            f"{dreadnode.KEY}.{SECRET}",
            dreadnode.ORGANIZATION,
            certificate_file=certificate_file,
            gateway_host=gateway_host,
        ),
    }


def what_to_try(gateway_port: int, certificate_file: str = "", *, gateway_host: str = LOOPBACK) -> str:
    """All of them, to print."""
    printed = commands(gateway_port, certificate_file, gateway_host=gateway_host)
    parts = [f"# {title}\n{command}" for title, command in printed.items()]
    return "\n\n".join(["", "Daybook is up, on demo data. Try, in another terminal:", *parts, "Ctrl-C stops it.", ""])


def _buf() -> str:
    """buf as installed beside this interpreter, relative to here where that is shorter."""
    path = Path(sys.executable).parent / "buf"
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
