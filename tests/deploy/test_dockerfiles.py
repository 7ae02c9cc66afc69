"""The images' recipes: linted, and agreed with compose, bake and the command line."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
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


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _pins(path: Path) -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^ \n;]+)", path.read_text(), re.M)
    return {_normal(name): version for name, version in found}


def test_images_install_the_pinned_versions_of_everything_that_fedgrpc_needs_by_hash() -> None:
    """`make lock` writes them."""
    locked, pinned = _pins(DOCKER / "requirements.txt"), _pins(ROOT / "constraints.txt")
    assert locked.items() <= pinned.items()
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {_normal(re.match(r"[A-Za-z0-9._-]+", each)[0]) for each in needed} <= locked.keys()
    entries = re.split(r"\n(?=[a-zA-Z])", (DOCKER / "requirements.txt").read_text())
    assert all("--hash=sha256:" in entry for entry in entries if "==" in entry)


@pytest.mark.parametrize("name", ["aggregator", "worker", "worker-lite"])
def test_an_image_refuses_packages_with_other_hashes(name: str) -> None:
    assert "--no-deps --require-hashes -r requirements.txt" in (DOCKER / f"{name}.Dockerfile").read_text()
