"""Shell commands that call the demo, as `daybook up --demo` prints them."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from server.demo import dreadnode, nebulablock, spacebring, teable, teams
from server.demo.load import SECRET
from server.transport.addresses import host_and_port, reachable

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Gateway:
    """The gateway that the commands call: over TLS if it has a certificate, which they then trust."""

    port: int
    host: str = LOOPBACK
    certificate_file: str = ""

    @property
    def _origin(self) -> str:
        if self.certificate_file:
            return f"https://localhost:{self.port}"
        return f"http://{host_and_port(reachable(self.host), self.port)}"

    @property
    def _trust(self) -> list[str]:
        return ["--cacert", self.certificate_file] if self.certificate_file else []

    def rest(self, key: str, path: str, *more: str) -> str:
        """A curl command that gets a path."""
        header = f"Authorization: Bearer {key}"
        return shlex.join(["curl", "-sS", *self._trust, "-H", header, *more, f"{self._origin}{path}"])

    def page(self, key: str) -> str:
        """The address of the page in the browser, which opens it with a key."""
        return f"{self._origin}/#key={key}"

    def list_transactions(self, key: str, account_id: str) -> str:
        """A buf command that lists an account's transactions over gRPC."""
        connection = self._trust or ["--http2-prior-knowledge"]
        request = f'{{"parent": "accounts/{account_id}", "pageSize": 2}}'
        header = f"Authorization: Bearer {key}"
        url = f"{self._origin}/daybook.v1.Ledger/ListTransactions"
        return shlex.join([_buf(), "curl", "--protocol", "grpc", *connection, "-H", header, "-d", request, url])


def commands(gateway: Gateway) -> dict[str, str]:
    """A command for each API, by its title."""

    def curl(key_id: str, path: str, *more: str) -> str:
        return gateway.rest(f"{key_id}.{SECRET}", path, *more)

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
        "Native gRPC, by reflection": gateway.list_transactions(f"{dreadnode.KEY}.{SECRET}", dreadnode.ORGANIZATION),
    }


def what_to_try(gateway: Gateway) -> str:
    """The text that `daybook up --demo` prints: all commands, with an introduction."""
    introduction = (
        f"Daybook is up, on demo data. Look at it in a browser:\n\n{gateway.page(f'{teams.KEY}.{SECRET}')}\n\n"
        "Try, in another terminal:"
    )
    return to_text(introduction, commands(gateway), "Ctrl-C stops it.")


def to_text(introduction: str, commands: dict[str, str], *end: str) -> str:
    """A text of an introduction, each command after its title, and closing lines."""
    parts = [f"# {title}\n{command}" for title, command in commands.items()]
    return "\n\n".join(["", introduction, *parts, *end, ""])


def _buf() -> str:
    """The path of the `buf` command in this virtual environment, relative to the current directory if possible."""
    path = Path(sys.executable).parent / "buf"
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
