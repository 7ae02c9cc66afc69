"""Federated learning for fleets of unequal edge devices, over gRPC."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fedgrpc")
except PackageNotFoundError:
    __version__ = "0.0.0"
