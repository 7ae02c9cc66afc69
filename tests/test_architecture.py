"""Imports point down only: each package may import what the table says, and nothing else of fedgrpc."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.code_metrics import circles, read_package

PACKAGE = Path(__file__).parent.parent / "fedgrpc"

# Every module or package right below fedgrpc, and what it may import besides itself.
CORE = {
    *("errors", "claims", "training_plan", "codec", "submodels", "aggregation", "algorithms", "privacy"),
    *("rounds", "runs"),
}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "claims": {"errors"},
    "toml": {"errors"},
    "training_plan": {"errors"},
    "v1": set(),
    "codec": {"errors", "plugins"},
    "submodels": {"errors", "claims", "toml"},
    "aggregation": {"errors", "claims", "submodels", "plugins"},
    "plugins": {"errors"},
    "algorithms": {"errors", "plugins", "training_plan", "codec", "aggregation"},
    "tracking": {"errors", "plugins", "v1"},
    "privacy": {"errors", "claims", "codec", "aggregation"},
    "rounds": {"errors", "claims", "plugins"},
    "runs": {
        "errors",
        "claims",
        "training_plan",
        "codec",
        "submodels",
        "aggregation",
        "algorithms",
        "privacy",
        "rounds",
    },
    "trainer": {"errors", "codec", "training_plan", "submodels", "algorithms"},
    "process": set(),
    "aio": set(),
    "logging": {"errors"},
    "metrics": {"errors", "claims", "rounds", "v1", "protocol", "rpc", "process"},
    "protocol": {*CORE, "v1"},
    "identity": {"errors", "claims", "privacy", "v1", "protocol", "storage"},
    "rpc": {"errors", "tracing", "claims", "codec", "v1", "protocol", "aio", "process", "identity"},
    "storage": {*CORE, "v1", "protocol", "process"},
    "aggregator": {
        *(*CORE, "v1", "protocol", "rpc", "identity", "storage", "aio", "process", "logging", "metrics"),
        *("tracking", "tracing", "plugins"),
    },
    "worker": {
        "tracing",
        *CORE,
        "trainer",
        "v1",
        "protocol",
        "rpc",
        "identity",
        "storage",
        "aio",
        "process",
        "logging",
        "metrics",
    },
    # An aggregator below another is both, and so above both: neither knows of it, nor of the other.
    "hierarchy": {
        *(*CORE, "trainer", "v1", "protocol", "rpc", "identity", "storage", "process", "metrics"),
        *("aggregator", "worker"),
    },
    "plots": {"errors"},
    "words": {"claims", "v1"},
    "tracing": {"errors", "v1"},
    "gauges": {"errors", "v1", "calls", "identity"},
    "web": {
        "errors",
        "claims",
        "v1",
        "protocol",
        "identity",
        "storage",
        "rpc",
        "process",
        "calls",
        "words",
        "runs",
    },
    "calls": {"errors", "rpc", "identity", "storage", "v1", "model_client"},
    "reach": {"errors", "calls", "rpc", "identity", "protocol"},
    "model_client": {"errors", "codec", "protocol", "rpc", "storage", "v1"},
    "datasets": {"errors", "plugins", "storage"},
    "torch": {"errors", "codec", "submodels", "algorithms", "storage", "datasets", "trainer", "worker"},
    "tasks": {"errors", "datasets", "torch", "trainer", "worker"},
    # The run as it is deployed, but for transport and clock: above both sides, as a leaf is.
    "simulation": {
        *(*CORE, "trainer", "toml", "v1", "protocol", "storage", "logging", "metrics"),
        *("aggregator", "worker", "plots"),
    },
    "__main__": {"cli"},
    # The public API: keyword arguments are settings of the command line, read by the same code.
    "api": {
        *(
            "errors",
            "trainer",
            "codec",
            "runs",
            "rounds",
            "v1",
            "protocol",
            "rpc",
            "identity",
            "storage",
            "logging",
        ),
        *("calls", "reach", "model_client", "aggregator", "worker", "simulation", "toml", "cli"),
    },
    "cli": {
        "plots",
        *(*CORE, "trainer", "v1", "protocol", "rpc", "identity", "storage", "process", "logging", "metrics"),
        *(
            "calls",
            "reach",
            "plugins",
            "tracking",
            "model_client",
            "aggregator",
            "worker",
            "hierarchy",
            "datasets",
            "tasks",
            "torch",
        ),
        *("simulation", "toml", "words", "web", "gauges", "tracing"),
    },
}
# Where torch may be imported; everything else runs on a machine without it.
TORCH = {"torch", "tasks"}
# The core knows no I/O, no clock and no gRPC.
PURE = {
    "claims",
    "plugins",
    "algorithms",
    "toml",
    "training_plan",
    "codec",
    "submodels",
    "aggregation",
    "privacy",
    "rounds",
    "runs",
}
IMPURE_MODULES = {
    *("asyncio", "concurrent", "datetime", "grpc", "multiprocessing", "pathlib", "random", "shutil"),
    *("signal", "socket", "sqlite3", "structlog", "subprocess", "threading", "time", "torch"),
}


def _modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE)


def _owner(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> Iterator[str]:
    """Full names of what a module imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide what they point to"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _packages_imported(path: Path) -> set[str]:
    names = (name.split(".") for name in _imports(path) if name.startswith("fedgrpc."))
    return {parts[1] for parts in names if parts[1] != "__version__"}


def test_every_package_has_its_place_in_the_table() -> None:
    assert {_owner(path) for path in _modules()} <= MAY_IMPORT.keys()


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_only(path: Path) -> None:
    owner = _owner(path)
    assert _packages_imported(path) <= MAY_IMPORT[owner] | {owner}


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_torch_lives_in_torch_and_tasks_only(path: Path) -> None:
    roots = {name.split(".")[0] for name in _imports(path)}
    assert "torch" not in roots or _owner(path) in TORCH


@pytest.mark.parametrize("path", [path for path in _modules() if _owner(path) in PURE], ids=str)
def test_the_core_is_pure(path: Path) -> None:
    assert not {name.split(".")[0] for name in _imports(path)} & IMPURE_MODULES


def _classes() -> Iterator[tuple[Path, ast.ClassDef]]:
    for path in _modules():
        yield from (
            (path, node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)
        )


def _private_methods(node: ast.ClassDef) -> set[str]:
    methods = (each.name for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))
    return {name for name in methods if name.startswith("_") and not name.startswith("__")}


def test_no_class_overrides_private_methods_of_another_module() -> None:
    """A class that has to be extended takes a collaborator, or says so by a public method."""
    classes = list(_classes())
    overridden = [
        f"{path.name}: {node.name} overrides {name} of {base.name}"
        for path, node in classes
        for base_path, base in classes
        if base_path != path and base.name in {ast.unparse(each) for each in node.bases}
        for name in _private_methods(node) & _private_methods(base)
    ]
    assert not overridden


def test_no_modules_import_each_other() -> None:
    """Imports that only type checkers follow count, too."""
    assert circles(read_package(PACKAGE)) == []


def test_importing_the_aggregator_imports_no_torch() -> None:
    modules = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in _modules()
        if _owner(path)
        in {*CORE, "aggregator", "hierarchy", "protocol", "rpc", "identity", "storage", "logging", "metrics"}
    ]
    code = f"import sys, importlib\n[importlib.import_module(name) for name in {modules!r}]"
    code += "\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "False"
