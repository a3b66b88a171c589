"""Runs `daybook import` on a real server."""

from __future__ import annotations

from dataclasses import dataclass

from typer.testing import Result

from daybook_client import Daybook
from tests.support.command_line import invoke


@dataclass(frozen=True)
class Importer:
    """Runs `daybook import` for one empty tenant."""

    address: str
    key: str
    client: Daybook

    def run(self, *arguments: str) -> Result:
        """Runs the command."""
        return invoke("import", *arguments, settings={"DAYBOOK_ADDRESS": self.address, "DAYBOOK_KEY": self.key})

    def imported(self, *arguments: str) -> str:
        """Runs the command, which must succeed. Returns its output."""
        result = self.run(*arguments)
        assert (result.exit_code, result.stderr) == (0, ""), result.output
        return result.stdout

    def state(self) -> dict[str, list[str]]:
        """The name of each account, with its transactions in short, oldest first."""
        return {
            account.name.removeprefix("accounts/"): [
                f"{each.kind} {each.category} {each.amount}"
                for each in self.client.list_transactions(account.name, order_by="create_time")
            ]
            for account in self.client.list_accounts()
        }
