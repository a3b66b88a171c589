"""The commands of docs/cli.md, run one after the other against a real server."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from tests.support.processes import BIN, ROOT, environment
from tests.support.python_clients import ServedLedger
from tests.support.waiting import SECONDS_MAX

PAGE = (ROOT / "docs" / "cli.md").read_text()


def test_documented_commands_succeed(ledger: ServedLedger, tmp_path: Path) -> None:
    """The commands of the page succeed in their order, with the variables and with the profiles that it describes."""
    first, *rest = re.findall(r"(?ms)^```sh\n(.*?)^```", PAGE)
    exports = first.replace("127.0.0.1:50051", ledger.address).replace("demo-dreadnode.public", ledger.key)
    assert exports != first
    (profiles,) = re.findall(r"(?ms)^```toml\n(.*?)^```", PAGE)
    file = tmp_path / ".config" / "daybook" / "profiles.toml"
    file.parent.mkdir(parents=True)
    # The server of the test has no TLS.
    profiles = re.sub(r"ca_file = .*\n", "", profiles).replace('"..."', f'"{ledger.key}"')
    file.write_text(profiles.replace("staging.example.com:443", ledger.address))
    file.chmod(0o600)
    script = exports + "".join(rest) + "unset DAYBOOK_ADDRESS DAYBOOK_KEY\n"
    script += "daybook balance ada --profile staging --output csv\n"
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    variables = environment(PATH=path, HOME=str(tmp_path), XDG_CONFIG_HOME=str(tmp_path / ".config"))
    result = subprocess.run(
        ["sh", "-e"],
        input=script,
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1].split(",")[1] == "19.75"
    assert len((tmp_path / "charges.csv").read_text().splitlines()) == 2
    assert len((tmp_path / "all.ndjson").read_text().splitlines()) >= 2
