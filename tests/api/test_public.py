"""The public names: which there are, what importing them costs, and that the guide lists them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedgrpc

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "python.md"

# The promise of docs/guide/python.md: none of these goes without having been deprecated for a minor release.
PUBLIC = {
    *("Aggregator", "Worker", "Client", "simulate", "sweep", "load_model"),
    *("Trainer", "TrainJob", "TrainResult", "EvalResult", "TorchTask", "FedgrpcError"),
    *("Run", "Round", "Task", "Device", "ModelVersion", "Rows"),
    *(
        "Algorithm",
        "CoordinateRule",
        "DistanceRule",
        "ServerOptimizer",
        "Selector",
        "Encoding",
        "Tracker",
        "Partition",
    ),
}


def modules_after(code: str) -> set[str]:
    """Return the modules that a new process has loaded after `code`."""
    show = f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True, timeout=300)
    return set(json.loads(done.stdout))


def test_no_public_name_has_come_or_gone() -> None:
    assert set(fedgrpc.__all__) == PUBLIC
    assert set(dir(fedgrpc)) == {*PUBLIC, "__version__"}


def test_type_checkers_know_the_same_names() -> None:
    stub = Path(fedgrpc.__file__).with_suffix(".pyi").read_text()
    assert set(re.findall(r" as (\w+)", stub)) == PUBLIC


def test_the_guide_lists_each_public_name() -> None:
    table = GUIDE.read_text().partition("## What is public")[2]
    assert set(re.findall(r"`([A-Za-z_]+)`", "".join(re.findall(r"^\|.*\|$", table, re.MULTILINE)))) >= PUBLIC


def test_importing_fedgrpc_imports_nothing_else() -> None:
    bare, after = modules_after(""), modules_after("import fedgrpc")
    new = {name for name in after - bare if not name.startswith("importlib")}
    assert {name for name in new if name.startswith("fedgrpc")} == {"fedgrpc"}
    assert not new & {"numpy", "grpc", "torch", "click", "asyncio", "google.protobuf"}


@pytest.mark.parametrize("name", sorted(PUBLIC - {"TorchTask"}))
def test_every_name_but_the_torch_task_is_there_without_torch(name: str) -> None:
    missing = "import sys; sys.modules['torch'] = None"
    assert "fedgrpc" in modules_after(f"{missing}\nfrom fedgrpc import {name}\nassert {name}.__doc__")


def test_a_name_that_there_is_not_is_refused_as_any_module_does() -> None:
    with pytest.raises(AttributeError, match="Clinet"):
        _ = fedgrpc.Clinet
    assert not hasattr(fedgrpc, "aggregat")
