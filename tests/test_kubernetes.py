"""The manifests in docs/deploy/kubernetes.yaml, validated against Kubernetes' schemas, and against Daybook."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from server.app import SERVICES
from server.config import Settings
from tests.support.command_line import invoke, require_command
from tests.support.gateways import require_valid
from tests.support.processes import ROOT

TEXT = (ROOT / "docs/deploy/kubernetes.yaml").read_text()
MANIFESTS: list[dict[str, Any]] = list(yaml.safe_load_all(TEXT))
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docs/deploy/compose.yaml").read_text())["services"]
# gRPC probes are stable since the first of these versions.
VERSIONS = ("1.27", kubernetes_validate.latest_version())


def of_kind(kind: str) -> dict[str, Any]:
    """Returns the manifests of a kind by their names."""
    return {each["metadata"]["name"]: each for each in MANIFESTS if each["kind"] == kind}


PODS = {name: each["spec"]["template"]["spec"] for name, each in of_kind("Deployment").items()}
SERVER, GATEWAY = PODS["daybook-server"], PODS["daybook-gateway"]
CONTAINERS: dict[str, dict[str, Any]] = {
    each["name"]: each for pod in PODS.values() for each in (*pod["initContainers"], *pod["containers"])
}
DATA: dict[str, str] = of_kind("ConfigMap")["daybook"]["data"]
SETTINGS = Settings(**{name.removeprefix("DAYBOOK_").lower(): value for name, value in DATA.items()})  # type: ignore[arg-type]
LABELS = {name: each["spec"]["template"]["metadata"]["labels"] for name, each in of_kind("Deployment").items()}


def keys(value: Any, name: str) -> Iterator[Any]:
    """Yields the value of each key of this name, at any depth."""
    if isinstance(value, dict):
        for key, below in value.items():
            if key == name:
                yield below
            yield from keys(below, name)
    elif isinstance(value, list):
        for each in value:
            yield from keys(each, name)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda each: f"{each['kind']} {each['metadata']['name']}")
def test_manifests_have_the_schema_of_kubernetes(manifest: dict[str, Any], version: str) -> None:
    """Kubernetes knows every field, and every value has the right type."""
    kubernetes_validate.validate(manifest, version, strict=True)
    spec = manifest.get("spec", manifest)
    with pytest.raises(kubernetes_validate.ValidationError, match="unknownField"):
        kubernetes_validate.validate({**manifest, "spec": {**spec, "unknownField": 1}}, version, strict=True)


def test_settings_are_valid() -> None:
    """Each value of the ConfigMap is a setting, which the containers get."""
    assert {name.removeprefix("DAYBOOK_").lower() for name in DATA} == SETTINGS.model_fields_set
    assert SETTINGS.host == SETTINGS.metrics_host == "0.0.0.0"  # noqa: S104  # the kubelet and Prometheus connect
    for name in ("migrate", "server", "gateway-config"):
        assert CONTAINERS[name]["envFrom"] == [{"configMapRef": {"name": "daybook"}}]


def test_manifests_contain_no_secret() -> None:
    """The password comes from a Secret that the manifests only name."""
    assert not of_kind("Secret")
    for name in ("migrate", "server"):
        (variable,) = CONTAINERS[name]["env"]
        assert variable == {
            "name": "PGPASSWORD",
            "valueFrom": {"secretKeyRef": {"name": "daybook-database", "key": "password"}},
        }
    assert not re.search(r"://\w+:\w", TEXT)
    assert "create secret generic daybook-database --from-literal=password=..." in TEXT


def test_images_are_those_of_compose() -> None:
    """Both deployments have the same images, whose names have no registry."""
    images = {name: each["image"] for name, each in CONTAINERS.items()}
    assert images.pop("gateway") == COMPOSE["gateway"]["image"]
    assert set(images.values()) == {COMPOSE["server-1"]["image"]}
    for image in (*images.values(), CONTAINERS["gateway"]["image"]):
        first, slash, _ = image.partition("/")
        assert not (slash and re.search(r"[.:]|^localhost$", first))


def test_commands_are_valid() -> None:
    """`daybook` accepts the arguments of the containers, and of the commands in the comment."""
    for name in ("migrate", "server", "gateway-config"):
        assert "command" not in CONTAINERS[name]
        require_command(*CONTAINERS[name]["args"])
    comment = TEXT.partition("---\n")[0]
    shown = re.findall(r"^#     (kubectl .*)$", comment, re.MULTILINE)
    assert len(shown) == 5
    for line in shown:
        require_kubectl(line)


def require_kubectl(line: str) -> None:
    """Fails unless each object and file of a kubectl command exists, and `daybook` accepts a command after `--`."""
    assert set(re.findall(r"deployment/([\w-]+)", line)) <= PODS.keys()
    for file in re.findall(r"--filename (\S+)", line):
        assert (ROOT / file).is_file()
    if " -- daybook " in line:
        require_command(*shlex.split(line.partition(" -- daybook ")[2]))


def test_ports_are_those_of_the_settings() -> None:
    """The ports of containers, services and probes are those on which server and gateway listen."""
    ports = {
        name: {each["name"]: each["containerPort"] for each in CONTAINERS[name]["ports"]}
        for name in ("server", "gateway")
    }
    assert ports == {
        "server": {"grpc": SETTINGS.port, "metrics": SETTINGS.metrics_port},
        "gateway": {"http": SETTINGS.gateway_port, "metrics": SETTINGS.gateway_metrics_port},
    }
    for name, service in of_kind("Service").items():
        own = ports[name.removeprefix("daybook-")]
        assert {each["targetPort"]: each["port"] for each in service["spec"]["ports"]} == own
    for each in keys(of_kind("NetworkPolicy"), "port"):
        assert each in ports["server"]
    assert [each["port"] for each in keys(SERVER, "grpc")] == [SETTINGS.port] * 3
    assert {each["port"] for each in keys(GATEWAY, "httpGet")} == {"http"}


def test_probes_ask_for_the_right_thing() -> None:
    """Readiness asks for the service of the API or the ready servers; liveness does not depend on the database."""
    server, gateway = CONTAINERS["server"], CONTAINERS["gateway"]
    for probe in ("startupProbe", "readinessProbe"):
        assert server[probe]["grpc"]["service"] in SERVICES
    assert "service" not in server["livenessProbe"]["grpc"]
    assert gateway["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert gateway["livenessProbe"]["httpGet"]["path"] == gateway["startupProbe"]["httpGet"]["path"] == "/healthz"
    for container in (server, gateway):
        startup = container["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 60


def test_selectors_match_the_pods() -> None:
    """Every selector selects the pods of one deployment; a disruption leaves one of at least two."""
    for name, deployment in of_kind("Deployment").items():
        assert deployment["spec"]["selector"]["matchLabels"] == LABELS[name]
        (spread,) = PODS[name]["topologySpreadConstraints"]
        assert spread["labelSelector"]["matchLabels"] == LABELS[name]
        assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
        budget = of_kind("PodDisruptionBudget")[name]["spec"]
        assert budget["selector"]["matchLabels"] == LABELS[name]
        assert 1 <= budget["minAvailable"] < deployment["spec"]["replicas"]
        assert of_kind("Service")[name]["spec"]["selector"] == LABELS[name]
    policy = of_kind("NetworkPolicy")["daybook-server"]["spec"]
    assert policy["podSelector"]["matchLabels"] == LABELS["daybook-server"]
    assert [each["matchLabels"] for each in keys(policy["ingress"], "podSelector")] == [LABELS["daybook-gateway"]]


def test_pods_are_confined() -> None:
    """No container runs as root, writes to its image, or has a capability or a token of the cluster."""
    for pod in PODS.values():
        context = pod["securityContext"]
        assert context["runAsNonRoot"]
        assert context["runAsUser"] == context["runAsGroup"] == 10001
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
    for container in CONTAINERS.values():
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        resources = container["resources"]
        assert resources["requests"].keys() == {"cpu", "memory"}
        assert resources["limits"] == {"memory": resources["requests"]["memory"]}


def test_services_set_no_settings() -> None:
    """Kubernetes sets no variables for services, because some would have the names of settings."""
    linked = {f"{name.replace('-', '_')}_port" for name in of_kind("Service")}
    assert {name.removeprefix("daybook_") for name in linked} & Settings.model_fields.keys()
    assert [pod["enableServiceLinks"] for pod in PODS.values()] == [False, False]


def test_pods_have_time_to_drain() -> None:
    """The kubelet kills no pod before it has drained: the server by itself, the gateway in preStop."""
    drained = SETTINGS.shutdown_drain_seconds + SETTINGS.shutdown_grace_seconds
    assert SERVER["terminationGracePeriodSeconds"] > drained
    (seconds,) = re.findall(r"sleep (\d+)", pre_stop())
    assert int(seconds) < GATEWAY["terminationGracePeriodSeconds"]


def pre_stop() -> str:
    """Returns the script that the kubelet runs before it ends a gateway."""
    shell, flag, script = CONTAINERS["gateway"]["lifecycle"]["preStop"]["exec"]["command"]
    assert (shell, flag) == ("bash", "-c")
    return str(script)


def test_gateway_configuration_is_valid(tmp_path: Path) -> None:
    """The init container writes a configuration that Envoy accepts, and that names the servers' service."""
    name, folder, *rest = CONTAINERS["gateway-config"]["args"]
    (mount,) = CONTAINERS["gateway-config"]["volumeMounts"]
    assert mount["mountPath"] == folder
    assert CONTAINERS["gateway"]["volumeMounts"] == [mount]
    assert [volume["name"] for volume in GATEWAY["volumes"]] == [mount["name"]]
    command = CONTAINERS["gateway"]["command"]
    assert command[:3] == ["envoy", "--config-path", f"{folder}/envoy.yaml"]
    result = invoke(name, str(tmp_path), *rest, settings=DATA)
    assert result.exit_code == 0, result.output
    require_valid(tmp_path / "envoy.yaml", *command[3:])
    written = yaml.safe_load((tmp_path / "envoy.yaml").read_text())["static_resources"]
    addresses = [each["socket_address"] for each in keys(written["clusters"][0], "address") if isinstance(each, dict)]
    assert addresses == [{"address": "daybook-server", "port_value": SETTINGS.port}]
    assert addresses[0]["address"] in of_kind("Service")
