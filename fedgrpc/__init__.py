"""Federated learning for fleets of unequal edge devices, over gRPC."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`__version__`, looked up when it is asked for: a container's health check has no use for it."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fedgrpc")
    except PackageNotFoundError:
        return "0.0.0"
