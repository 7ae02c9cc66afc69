"""The images' recipes: linted, and agreed with compose, bake and the command line."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fedgrpc.cli.main import load_command
from fedgrpc.cli.options import SettingsCommand
from tests.deploy.manifests import ROOT, image_environment, settings_in

DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_hadolint_finds_nothing(path: Path) -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint: it comes with pip install '.[dev]'")
    done = subprocess.run([hadolint, str(path)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_what_an_image_sets_are_settings(path: Path) -> None:
    environment = image_environment(f"x/fedgrpc-{path.stem}:x")
    assert "FEDGRPC_HEALTH_ADDRESS" in environment
    _check(environment)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_runs_as_nobody_special_and_keeps_its_state_in_one_volume(path: Path) -> None:
    text = path.read_text()
    assert re.search(r"^USER 10001:10001$", text, re.M)
    assert re.findall(r"^VOLUME (.+)$", text, re.M) == ["/var/lib/fedgrpc"]
    assert text.index("\nUSER ") < text.index("\nENTRYPOINT ")


def test_bake_knows_every_dockerfile() -> None:
    named = re.findall(r'dockerfile = "docker/(.+)"', (DOCKER / "docker-bake.hcl").read_text())
    assert sorted(named) == [path.name for path in DOCKERFILES]


def test_compose_says_what_the_commands_take() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert len(services) == 6
    for service in services.values():
        assert (DOCKER / Path(service["build"]["dockerfile"]).name).exists()
        assert service["read_only"] is True
        _check(service["environment"])


def test_compose_is_insecure_only_where_this_machine_alone_can_call() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert services["aggregator"]["environment"]["FEDGRPC_AGGREGATOR_INSECURE"] == "true"
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def _check(environment: dict[str, str]) -> None:
    checked = 0
    for variable, name, key in settings_in(environment):
        command = load_command(name)
        assert isinstance(command, SettingsCommand)
        assert key in {setting.key for setting in command.settings()}, variable
        checked += 1
    assert checked >= 2
