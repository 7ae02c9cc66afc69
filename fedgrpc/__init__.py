"""Federated learning for fleets of unequal edge devices, over gRPC.

The names of `__all__` are the public API: docs/guide/python.md says what that promises. Each is imported when it
is first used, so that `import fedgrpc` costs next to nothing, and nothing but `TorchTask` needs PyTorch.
`__init__.pyi` has them for type checkers.
"""

import os
from importlib import import_module
from typing import Any

# gRPC would start threads of its own in every forked child, which use the parent's connections: a third of the
# children crashed so on a busy machine. It reads this once, when it is imported.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

_PLACES = {
    "fedgrpc.api.aggregator": ("Aggregator",),
    "fedgrpc.api.client": ("Client",),
    "fedgrpc.api.model": ("load_model",),
    "fedgrpc.api.records": ("Device", "ModelVersion", "Round", "Run", "Task"),
    "fedgrpc.api.rows": ("Rows",),
    "fedgrpc.api.simulation": ("simulate", "sweep"),
    "fedgrpc.api.worker": ("Worker",),
    "fedgrpc.errors": ("FedgrpcError",),
    "fedgrpc.torch.task": ("TorchTask",),
    "fedgrpc.trainer": ("EvalResult", "TrainJob", "TrainResult", "Trainer"),
    # What plugins implement (docs/guide/extend.md).
    "fedgrpc.aggregation.robust.rule": ("CoordinateRule", "DistanceRule"),
    "fedgrpc.aggregation.server_optimizer": ("ServerOptimizer",),
    "fedgrpc.algorithms.algorithm": ("Algorithm",),
    "fedgrpc.codec.encoding": ("Encoding",),
    "fedgrpc.datasets.partition": ("Partition",),
    "fedgrpc.rounds.selector": ("Selector",),
    "fedgrpc.tracking.tracker": ("Tracker",),
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [
    "Aggregator",
    "Algorithm",
    "Client",
    "CoordinateRule",
    "Device",
    "DistanceRule",
    "Encoding",
    "EvalResult",
    "FedgrpcError",
    "ModelVersion",
    "Partition",
    "Round",
    "Rows",
    "Run",
    "Selector",
    "ServerOptimizer",
    "Task",
    "TorchTask",
    "Tracker",
    "TrainJob",
    "TrainResult",
    "Trainer",
    "Worker",
    "load_model",
    "simulate",
    "sweep",
]


def __getattr__(name: str) -> Any:
    """Import a public name, and keep it. `__version__` is looked up likewise."""
    if name == "__version__":
        return _version()
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_MODULES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fedgrpc")
    except PackageNotFoundError:
        return "0.0.0"
