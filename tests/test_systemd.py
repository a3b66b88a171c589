"""The unit of systemd in docs/deploy, checked by systemd-analyze if it is installed, and against Daybook."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

from server.config import Settings
from tests.support.command_line import require_command
from tests.support.processes import BIN, ROOT

UNIT = (ROOT / "docs/deploy/daybook.service").read_text()
PAGE = (ROOT / "docs/operate/deploy.md").read_text()
PROGRAM = "/opt/daybook/bin/daybook"
EXPOSURE_MAX = 2.0
"""The highest exposure of a confined service, on systemd-analyze's scale from 0 to 10."""


def options() -> dict[str, list[str]]:
    """Returns the values of each option of the unit, as `Section.Option`."""
    found, section = defaultdict(list), ""
    for line in UNIT.splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found[f"{section}.{name}"].append(value)
    return found


OPTIONS = options()


def option(name: str) -> str:
    """Returns the only value of an option."""
    (value,) = OPTIONS[name]
    return value


def test_commands_are_valid() -> None:
    """`daybook` accepts the arguments of the unit's commands, also with `serve` in place of `up`."""
    program, *arguments = shlex.split(option("Service.ExecStart"))
    assert program == PROGRAM
    require_command(*arguments)
    assert "replace `up` by `serve`" in " ".join(UNIT.split())
    require_command("serve", *arguments[1:])
    *_, script = shlex.split(option("Service.ExecStartPost"))
    (waited,) = re.findall(rf"until {PROGRAM} (\w+) ", script)
    require_command(waited)


def test_folders_are_those_of_the_page() -> None:
    """The program, the settings and the database are in the folders that docs/operate/deploy.md names."""
    assert PROGRAM.removesuffix("/bin/daybook") in PAGE
    assert option("Service.EnvironmentFile") in PAGE
    assert option("Service.WorkingDirectory") == f"/var/lib/{option('Service.StateDirectory')}"
    assert option("Service.WorkingDirectory") in PAGE


def test_settings_are_valid() -> None:
    """The settings of the unit, and those of the page for it, are settings with valid values."""
    (block,) = re.findall(r"(?s)```ini\n(.*?)```", PAGE)
    given = dict(re.findall(r"DAYBOOK_(\w+)=(\S+)", f"{option('Service.Environment')} {block}"))
    settings = Settings(**{name.lower(): value for name, value in given.items()})
    assert len(given) > 2
    assert {name.lower() for name in given} == settings.model_fields_set


def test_unit_stops_after_the_drain() -> None:
    """SIGTERM goes to the main process only, and systemd kills the others after the drain and the grace period."""
    settings = Settings()
    assert option("Service.KillMode") == "mixed"
    seconds = float(option("Service.TimeoutStopSec").removesuffix("s"))
    assert seconds > settings.shutdown_drain_seconds + settings.shutdown_grace_seconds
    assert option("Service.Restart") == "always"
    # The exit status of invalid settings, in docs/reference/commands.md.
    assert option("Service.RestartPreventExitStatus") == "2"


if shutil.which("systemd-analyze"):

    def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
        """systemd knows every option and value of the unit, and finds the service confined."""
        file = tmp_path / "daybook.service"
        # systemd checks that programs exist.
        file.write_text(UNIT.replace(PROGRAM, str(BIN / "daybook")))
        assert analyze("verify", str(file)) == ""
        exposure = re.search(
            r"exposure level for daybook.service: ([0-9.]+)", analyze("security", "--offline=1", str(file))
        )
        assert exposure is not None
        assert float(exposure[1]) <= EXPOSURE_MAX
        file.write_text(file.read_text().replace("PrivateTmp", "PrivateTemporary"))
        assert "PrivateTemporary" in analyze("verify", str(file))

    def analyze(*arguments: str) -> str:
        """Returns the output of systemd-analyze with its messages."""
        result = subprocess.run(
            ["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60, check=False
        )
        return result.stdout + result.stderr
