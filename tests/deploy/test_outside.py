"""The ways for devices outside of the cluster: what they name is in the base, and the unit starts a worker."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedgrpc.cli import aggregator, worker
from fedgrpc.cli.values import DURATION
from tests.deploy.manifests import K8S, render, render_with_components, settings_in

OUTSIDE = K8S / "outside"
UNIT = OUTSIDE / "fedgrpc-worker.service"
AGGREGATOR_UNIT = OUTSIDE / "fedgrpc-aggregator.service"


def _objects(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((OUTSIDE / name).read_text()))


@pytest.mark.parametrize("name", ["nodeport.yaml", "ingress-h2c.yaml"])
def test_a_service_for_outside_selects_the_aggregator(name: str) -> None:
    base = render(K8S / "base")
    services = [item for item in _objects(name) if item["kind"] == "Service"]
    assert services
    for service in services:
        (workload,) = base.selected(service["spec"]["selector"], service["metadata"]["namespace"])
        assert [workload.ports[port["targetPort"]] for port in service["spec"]["ports"]] == [50051]


def test_the_ingress_leads_to_a_service_that_speaks_http2_in_the_clear() -> None:
    ingress, service, _ = _objects("ingress-h2c.yaml")
    (rule,) = ingress["spec"]["rules"]
    assert rule["host"] in ingress["spec"]["tls"][0]["hosts"]
    for path in rule["http"]["paths"]:
        target = path["backend"]["service"]
        assert target["name"] == service["metadata"]["name"]
        assert target["port"]["name"] in {port["name"] for port in service["spec"]["ports"]}
    assert rule["http"]["paths"][0]["path"] == "/fedgrpc.v1.Aggregator/"
    assert service["metadata"]["annotations"]["traefik.ingress.kubernetes.io/service.serversscheme"] == "h2c"


def test_the_passthrough_leads_to_an_aggregator_that_speaks_tls(tmp_path: Path) -> None:
    (route,) = _objects("ingress-tls-passthrough.yaml")
    manifests = render_with_components(tmp_path, "edge")
    for item in route["spec"]["routes"][0]["services"]:
        service = manifests.get("Service", item["name"], route["metadata"]["namespace"])
        assert item["port"] in {port["name"] for port in service["spec"]["ports"]}
        assert not any("appProtocol" in port for port in service["spec"]["ports"])
        (workload,) = manifests.selected(service["spec"]["selector"], "fedgrpc")
        assert "FEDGRPC_AGGREGATOR_TLS_CERT" in workload.environment()
    assert route["spec"]["tls"] == {"passthrough": True}


def test_the_environment_of_the_unit_is_that_of_a_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = (OUTSIDE / "worker.env").read_text().splitlines()
    lines += re.findall(r"^Environment=(.+)$", UNIT.read_text(), re.M)
    environment = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    assert len(list(settings_in(environment))) == len(environment) >= 7
    token = tmp_path / "join"
    token.write_text("fg1.token")
    for variable, value in environment.items():
        here = str(tmp_path) if variable.endswith("_DATA") else str(token) if variable.endswith("_JOIN") else value
        monkeypatch.setenv(variable, here)
    settings = worker.settings_from(worker.COMMAND.make_context("worker", []).params)
    stop_s = DURATION.convert(re.search(r"^TimeoutStopSec=(.+)$", UNIT.read_text(), re.M)[1], None, None)
    assert stop_s >= settings.drain_s + 15
    assert settings.exit_when_run_ends is False
    assert settings.join == "fg1.token"


def test_the_environment_of_the_aggregators_unit_is_that_of_an_aggregator(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = AGGREGATOR_UNIT.read_text()
    lines = (OUTSIDE / "aggregator.env").read_text().splitlines() + re.findall(r"^Environment=(.+)$", unit, re.M)
    environment = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    assert len(list(settings_in(environment))) == len(environment) >= 8
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    settings = aggregator.settings_from(aggregator.COMMAND.make_context("aggregator", []).params)
    assert settings.stay
    assert settings.has_authority
    stop_s = DURATION.convert(re.search(r"^TimeoutStopSec=(.+)$", unit, re.M)[1], None, None)
    assert stop_s >= settings.drain_s + 40


@pytest.mark.parametrize("source", [UNIT, AGGREGATOR_UNIT], ids=lambda path: path.stem)
def test_systemd_understands_the_unit(tmp_path: Path, source: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze")
    unit = tmp_path / source.name
    # The one thing that is not on this machine.
    unit.write_text(source.read_text().replace("/opt/fedgrpc/bin/fedgrpc", sys.executable))
    done = subprocess.run([analyze, "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=300)
    about = [line for line in (done.stdout + done.stderr).splitlines() if unit.name in line]
    assert (done.returncode, about) == (0, [])
    parsed = configparser.ConfigParser(strict=False, interpolation=None)
    parsed.optionxform = str  # type: ignore[method-assign,assignment]
    parsed.read(unit)
    assert parsed["Service"]["ExecStart"].endswith(f" {source.stem.removeprefix('fedgrpc-')}")
