"""The gateway drains before Kubernetes ends it, by the script of the manifests."""

from __future__ import annotations

import re
import subprocess

import pytest
import yaml

from server.config import Settings
from tests.support.http_client import send
from tests.support.processes import ROOT, Daybook


@pytest.fixture
def script(gateway: Daybook) -> str:
    """The script of preStop, with the port of the tests' Envoy and without the wait for load balancers."""
    manifests = yaml.safe_load_all((ROOT / "docs/deploy/kubernetes.yaml").read_text())
    (pod,) = [
        each["spec"]["template"]["spec"]
        for each in manifests
        if each["metadata"]["name"] == "daybook-gateway"
        if each["kind"] == "Deployment"
    ]
    text = str(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][2])
    assert f"/{Settings().gateway_admin_port}\n" in text
    return re.sub(r"sleep \d+", "", text).replace(f"/{Settings().gateway_admin_port}\n", f"/{gateway.ports.admin}\n")


def test_draining_gateway_is_not_ready_and_serves(gateway: Daybook, script: str) -> None:
    """After preStop began, /readyz fails, so that load balancers choose other gateways; requests still succeed."""
    admin = f"http://127.0.0.1:{gateway.ports.admin}"
    try:
        result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=True)
        assert result.stdout.rstrip() == "HTTP/1.1 200 OK"
        assert send(gateway.origin, "/readyz").status == 503
        answer = send(gateway.origin, "/v1/accounts/example", headers={"authorization": "Bearer demo-dreadnode.public"})
        assert answer.status == 200
        # The client opens its next connection at another gateway.
        assert answer.header("connection") == "close"
    finally:
        assert send(admin, "/healthcheck/ok", method="POST").status == 200
    assert send(gateway.origin, "/readyz").status == 200
