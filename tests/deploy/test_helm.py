"""The chart renders what the kustomize base has, and what Kubernetes takes; needs helm (`make helm`)."""

from __future__ import annotations

import copy
import shutil
import subprocess
import tomllib
from typing import Any

import pytest
import yaml

from fedgrpc.cli.main import load_command
from fedgrpc.cli.options import SettingsCommand
from tests.deploy.manifests import K8S, ROOT, Object, render
from tests.deploy.test_schemas import VERSIONS, check

CHART = K8S / "helm"
WAYS = {
    "as it is": [],
    "outside": ["service.type=NodePort", "service.nodePort=30051"],
    "an authority of one's own": ["tls.mode=own", "tls.secretName=mine"],
    "insecure": ["tls.mode=insecure"],
    "measured": ["metrics.enabled=true", "metrics.from=prometheus"],
    "elsewhere": ["storage.className=", "nodeSelector.disk=ssd", "image.pullSecrets[0].name=registry"],
}


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    built = ROOT / "build" / "helm" / "helm"
    program = str(built) if built.exists() else shutil.which("helm")
    if program is None:
        pytest.skip("no helm: make helm")
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120)


def chart(*values: str) -> list[Object]:
    sets = [word for value in values for word in ("--set", value)]
    done = helm("template", "fedgrpc", str(CHART), "--namespace", "fedgrpc", *sets)
    assert done.returncode == 0, done.stderr
    return [item for item in yaml.safe_load_all(done.stdout) if item]


def of(kind: str, objects: list[Object]) -> Any:
    (found,) = (item for item in objects if item["kind"] == kind)
    return found


def settings_of(objects: list[Object]) -> dict[str, str]:
    return dict(of("ConfigMap", objects)["data"])


def test_the_default_values_render_the_kustomize_base() -> None:
    ours, base = chart(), render(K8S / "base").objects
    wanted = {item["kind"]: copy.deepcopy(dict(item)) for item in base if item["kind"] != "Namespace"}
    found = {item["kind"]: copy.deepcopy(dict(item)) for item in ours}
    # What differs by design: the name of the settings has a hash there, and here the pod has it.
    wanted["ConfigMap"]["metadata"]["name"] = "aggregator"
    (source,) = wanted["StatefulSet"]["spec"]["template"]["spec"]["containers"][0]["envFrom"]
    source["configMapRef"]["name"] = "aggregator"
    del found["StatefulSet"]["spec"]["template"]["metadata"]["annotations"]
    assert found == wanted


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_valid_for_the_last_versions_of_kubernetes(way: str) -> None:
    for version in VERSIONS:
        assert check(chart(*WAYS[way]), version) == 6


@pytest.mark.parametrize("way", WAYS)
def test_the_settings_are_those_of_the_command_line(way: str) -> None:
    command = load_command("aggregator")
    assert isinstance(command, SettingsCommand)
    known = {f"FEDGRPC_AGGREGATOR_{setting.key.upper()}" for setting in command.settings()}
    assert set(settings_of(chart(*WAYS[way]))) <= known


def test_a_changed_setting_is_a_new_pod_and_insecure_is_said() -> None:
    def pod_of(objects: list[Object]) -> Any:
        return of("StatefulSet", objects)["spec"]["template"]["metadata"]["annotations"]

    assert pod_of(chart()) != pod_of(chart("settings.ROUNDS=51"))
    assert settings_of(chart("tls.mode=insecure"))["FEDGRPC_AGGREGATOR_INSECURE"] == "true"
    assert "FEDGRPC_AGGREGATOR_INSECURE" not in settings_of(chart())


@pytest.mark.parametrize(
    "wrong", ["tls.mode=none", "image.digest=latest", "storge.size=1Gi", "service.nodePort=80"]
)
def test_a_wrong_value_is_refused(wrong: str) -> None:
    assert helm("template", "fedgrpc", str(CHART), "--set", wrong).returncode != 0


def test_the_chart_is_of_the_packages_version_and_lints() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert about["version"] == about["appVersion"] == version
    assert helm("lint", "--strict", str(CHART)).returncode == 0
