"""The wheels: what is in them, and that a new environment with them alone runs the demo.

The new environment has the wheels, and links to exactly the installed distributions that their metadata requires. So
the test proves that no file of the project and no requirement is missing, without downloading all libraries. It does
not prove that an index has these libraries; `make setup` does. Nothing is downloaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path
from zipfile import Path as ZipPath
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

from tests.support.distributions import needed
from tests.support.http_client import send
from tests.support.processes import Daybook, Ports

ROOT = Path(__file__).resolve().parents[1]
BUILD_SECONDS_MAX = 300
READ_BALANCE = "from daybook_client import Daybook; print(Daybook().get_balance('accounts/example').name)"

pytestmark = pytest.mark.long


def run(*command: str | Path, folder: Path, **variables: str) -> str:
    """Runs a program with no other variables than PATH and these; returns its output. Fails unless it succeeds."""
    result = subprocess.run(
        [str(each) for each in command],
        cwd=folder,
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        timeout=BUILD_SECONDS_MAX,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The wheels of the server and the client, built from this tree, by the names of their distributions."""
    folder = tmp_path_factory.mktemp("wheels")
    sources = [str(ROOT / "clients" / "python"), str(ROOT)]
    # With the build backend of this environment.
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *options, *sources, folder=folder)
    return {path.name.partition("-")[0]: path for path in folder.glob("*.whl")}


def files(wheel: Path) -> set[str]:
    """Returns the names of the files in a wheel."""
    with ZipFile(wheel) as archive:
        return set(archive.namelist())


def requirements(wheel: Path) -> list[Requirement]:
    """Returns the requirements of a wheel without its extras, except for wheels of this project."""
    (metadata,) = (each for each in ZipPath(wheel).iterdir() if each.name.endswith(".dist-info"))
    found = [Requirement(each) for each in PathDistribution(metadata).requires or []]
    return [each for each in found if "extra" not in str(each.marker)]


def test_wheels_are_complete_and_share_no_file(wheels: Mapping[str, Path]) -> None:
    """Each wheel has its licence and py.typed, each file of the tree is in one of them, and none is in both."""
    assert wheels.keys() == {"daybook", "daybook_client"}
    server, client = files(wheels["daybook"]), files(wheels["daybook_client"])
    assert not server & client
    for package, found in (("server", server), ("daybook_client", client)):
        assert f"{package}/py.typed" in found
        assert [name for name in found if name.endswith(".dist-info/licenses/LICENSE")]
    listed = [
        "git",
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
        "server",
        "gen/daybook",
        "clients/python/daybook_client",
    ]
    tracked = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    expected = {name.removeprefix("gen/").removeprefix("clients/python/") for name in tracked}
    # A namespace, because both distributions have packages in it.
    assert "daybook/__init__.py" not in expected
    assert {name for name in server | client if ".dist-info/" not in name} == expected
    assert {name for name in client if name.startswith("daybook/")} == {
        name for name in expected if name.startswith("daybook/v1/")
    }


def test_client_wheel_works_alone(wheels: Mapping[str, Path], tmp_path: Path) -> None:
    """The client's wheel and its requirements are enough to import the client."""
    libraries = tmp_path / "libraries"
    link(needed(requirements(wheels["daybook_client"])), libraries)
    unpacked = tmp_path / "unpacked"
    ZipFile(wheels["daybook_client"]).extractall(unpacked)
    path = os.pathsep.join([str(unpacked), str(libraries)])
    program = "import daybook_client, sys; print('server' in sys.modules)"
    assert run(sys.executable, "-S", "-c", program, folder=tmp_path, PYTHONPATH=path) == "False\n"


def link(distributions: Mapping[str, Distribution], folder: Path) -> None:
    """Links the modules and the metadata of installed distributions into a folder."""
    folder.mkdir(exist_ok=True)
    for each in distributions.values():
        for name in {file.parts[0] for file in each.files or ()} - {"..", "__pycache__"}:
            if not (folder / name).exists():
                (folder / name).symlink_to(Path(str(each.locate_file(name))))


def test_new_environment_runs_the_demo(wheels: Mapping[str, Path], tmp_path: Path) -> None:
    """In a new environment and an empty folder, `daybook up --demo` answers over REST and gRPC, with reference."""
    environment, folder = tmp_path / "environment", tmp_path / "empty"
    folder.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", environment, folder=tmp_path)
    (libraries,) = environment.glob("lib/python*/site-packages")
    link(needed(requirements(wheels["daybook"]) + requirements(wheels["daybook_client"])), libraries)
    python = environment / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", str(python))
    run(*pip, "install", "--quiet", "--no-index", *wheels.values(), folder=folder)
    version = wheels["daybook"].name.split("-")[1]
    assert run(environment / "bin" / "daybook", "--version", folder=folder) == f"daybook {version}\n"
    ports = Ports.free()
    command = [str(environment / "bin" / "daybook"), "up", "--demo", *ports.flags]
    with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
        variables = {"PATH": os.environ["PATH"]}
        process = subprocess.Popen(command, cwd=folder, env=variables, stdout=stdout, stderr=stderr)
    daybook = Daybook(process, folder, ports)
    try:
        daybook.wait_for("Ctrl-C stops it.")
        key = "demo-dreadnode.public"
        headers = {"authorization": f"Bearer {key}"}
        assert send(daybook.origin, "/v1/accounts/example/balance", headers=headers).status == 200
        for path in ("/openapi.json", "/openapi/teable.json", "/docs", "/docs/swagger-ui/swagger-ui-bundle.js"):
            assert send(daybook.origin, path).status == 200
        address = f"127.0.0.1:{ports.server}"
        balance = run(python, "-c", READ_BALANCE, folder=folder, DAYBOOK_ADDRESS=address, DAYBOOK_KEY=key)
        assert balance == "accounts/example/balance\n"
        assert daybook.stop() == 0
    finally:
        daybook.kill()
