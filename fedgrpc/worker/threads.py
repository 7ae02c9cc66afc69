"""How the threads of PyTorch, scikit-learn and NumPy share a device with other processes."""

from __future__ import annotations

import importlib
import importlib.util
import os


def rest_while_waiting() -> None:
    """Let OpenMP's idle threads sleep rather than spin, unless the user has chosen (`OMP_WAIT_POLICY`).

    By default they spin for some milliseconds after each operation. Two workers on one machine then take each
    other's cores, and train ten times slower. Call it before torch is imported, which reads the variable once.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def use_threads(count: int) -> None:
    """Let each library of this process use so many threads; PyTorch and OpenMP are to be imported after it.

    What is loaded already, such as NumPy's BLAS, is told by threadpoolctl, which comes with scikit-learn.
    """
    os.environ["OMP_NUM_THREADS"] = str(count)
    if importlib.util.find_spec("threadpoolctl") is not None:
        importlib.import_module("threadpoolctl").threadpool_limits(count)
