"""Models as arrays by name: from a file, a data folder, or a running aggregator."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import numpy as np

from fedgrpc.cli.stored_runs import find_run
from fedgrpc.errors import UsageError
from fedgrpc.runs.keeping import Reference
from fedgrpc.storage.model_file import read_weights
from fedgrpc.storage.stored_run import StoredRun


def stored_model(data_dir: Path, run: str, version: str | int) -> dict[str, np.ndarray]:
    """Return a version in the data folder of an aggregator, which may run. Raises `UsageError` and `NotFound`."""
    found = StoredRun.read(find_run(data_dir, run))
    number = found.version(str(version)).version.version.version
    return read_weights(found.path(number))


def load_model(
    source: str | PathLike[str], *, address: str | None = None, data_dir: str | PathLike[str] | None = None
) -> dict[str, np.ndarray]:
    """Return the weights of a model as NumPy arrays by name.

    `source` is one of

        path/model.safetensors    a file
        path/data                 the data folder of an aggregator: the latest version of its own or only run
        RUN@best, RUN@17, RUN     a version of a run: in `data_dir`, else of the aggregator at `address`, else of
                                  the one that a `Client` finds by itself

    Raises `UsageError` for what is neither, `NotFound` for a run or a version that there is not, and `LinkError`
    for an aggregator that cannot be reached.
    """
    path = Path(source)
    if address is None and data_dir is None:
        if path.is_file():
            return read_weights(path)
        if path.is_dir():
            return stored_model(path, "", "latest")
        if path.suffix or len(path.parts) > 1:
            raise UsageError(f"there is no model {path}")
    reference = Reference.parse(str(source))
    if data_dir is not None:
        return stored_model(Path(data_dir), reference.run, reference.name)
    # Calls need the whole of gRPC, files do not.
    from fedgrpc.api.client import Client

    with Client(address, run=reference.run) as client:
        return client.model(reference.name)
