"""The package of `examples/plugin`: its own tests pass, it is listed, and a real run uses all of it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.command_line import EXAMPLES, ROOT, environment

PLUGIN = EXAMPLES / "plugin"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of processes that have the package installed, with metadata made of its pyproject.toml."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    site = tmp_path_factory.mktemp("site")
    info = site / f"fedgrpc_example-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))
    (site / "fedgrpc_example").symlink_to(PLUGIN / "fedgrpc_example")
    return environment({"PYTHONPATH": f"{ROOT}:{EXAMPLES}:{site}"})


def python(*arguments: str | Path, env: dict[str, str], cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=env, cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_its_own_tests_pass(installed, tmp_path):
    told = python("-m", "pytest", "-q", "-p", "no:cacheprovider", PLUGIN / "tests", env=installed, cwd=tmp_path)
    assert "6 passed" in told


def test_the_command_lists_it_and_imports_nothing_of_it(installed, tmp_path):
    code = (
        "import sys\nfrom fedgrpc.cli.main import run\nassert run(['plugins', '--json']) == 0\n"
        "assert not any(name.startswith('fedgrpc_example') for name in sys.modules)"
    )
    found = json.loads(python("-c", code, env=installed, cwd=tmp_path))
    own = {(each["kind"], each["name"]) for each in found if each["package"] == "fedgrpc-example"}
    assert own == {
        ("aggregation", "midrange"),
        ("server optimizer", "signsgd"),
        ("selection", "round-robin"),
        ("encoding", "fixed16"),
        ("partition", "stripes"),
        ("tracker", "csv"),
    }
    assert [(each["kind"], each["package"]) for each in found if each["name"] == "krum"] == [
        ("aggregation", "fedgrpc")
    ]
    told = python("-m", "fedgrpc", "plugins", env=installed, cwd=tmp_path)
    assert "fedgrpc_example.selection:RoundRobin, from fedgrpc-example 1.0" in told


RUN = """
import numpy as np
from fedgrpc import Aggregator, Worker
from tests.support.simulated_task import Blobs

settings = {
    "aggregation": "midrange:trim=0",
    "server_optimizer": "signsgd",
    "server_learning_rate": 0.125,
    "selection": "round-robin",
    "max_participants": 2,
    "upload_encoding": "fixed16:range=8.0",
    "track": "csv:figures.csv",
}
with Aggregator("data", rounds=3, min_workers=3, evaluate=False, **settings) as aggregator:
    for number in (1, 2, 3):
        Worker(aggregator, Blobs, name=f"pi-{number}", partition="stripes:2", part=f"{number}/3").start()
    aggregator.until_ended()
    for round_ in aggregator.client.rounds():
        if round_.kind == "train":
            print(round_.number, *sorted(task.device for task in round_.tasks))
            chosen = aggregator.client.call(aggregator.client.own.calls.round(round_.number)).tasks
            assert all("round-robin" in task.chosen for task in chosen), chosen
            assert {task.upload_recipe.split("+")[0] for task in chosen} == {"fixed16:range=8.0"}, chosen
    steps = aggregator.model("latest")["w"] - aggregator.model(3)["w"]
    assert set(np.abs(np.unique(steps)).tolist()) <= {0.0, 0.125}, np.unique(steps)
"""


def test_a_real_run_uses_every_kind(installed, tmp_path):
    told = python("-c", RUN, env=installed, cwd=tmp_path).splitlines()
    # Two of three in turn: who sits out one round takes part in the next.
    rounds = [line.split()[1:] for line in told]
    assert [len(workers) for workers in rounds] == [2, 2, 2]
    everybody = {"pi-1", "pi-2", "pi-3"}
    assert all(everybody - set(before) <= set(after) for before, after in pairwise(rounds))
    with (tmp_path / "figures.csv").open() as file:
        assert {row[2] for row in csv.reader(file)} >= {"bytes/up", "round/updates"}
