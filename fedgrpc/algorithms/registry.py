"""The algorithms by name, and any class of one as `package.module:Class` (`--algorithm`)."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from fedgrpc.algorithms.algorithm import Algorithm
from fedgrpc.algorithms.ditto import Ditto
from fedgrpc.algorithms.fedasync import FedAsync
from fedgrpc.algorithms.fedavg import FedAvg
from fedgrpc.algorithms.fedbn import FedBN
from fedgrpc.algorithms.feddyn import FedDyn
from fedgrpc.algorithms.fednova import FedNova
from fedgrpc.algorithms.fedprox import FedProx
from fedgrpc.algorithms.fedrep import FedRep
from fedgrpc.algorithms.ifca import Ifca
from fedgrpc.algorithms.qfedavg import QFedAvg
from fedgrpc.algorithms.scaffold import Scaffold
from fedgrpc.errors import UsageError
from fedgrpc.plugins import make

ALGORITHMS: Final[dict[str, type]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "scaffold": Scaffold,
    "fednova": FedNova,
    "feddyn": FedDyn,
    "ditto": Ditto,
    "fedrep": FedRep,
    "fedbn": FedBN,
    "ifca": Ifca,
    "qfedavg": QFedAvg,
    "fedasync": FedAsync,
}


def own_class(text: str | None) -> str:
    """Return the `package.module:Class` of a text; "" where it names an algorithm of this package."""
    name, _, rest = (text or "fedavg").partition(":")
    return "" if name in ALGORITHMS else f"{name}:{rest.partition(':')[0]}"


@lru_cache(maxsize=64)
def algorithm_of(text: str | None) -> Algorithm:
    """Return the algorithm of a text such as `scaffold:workers=10`; None is FedAvg. Raises `UsageError`."""
    made = FedAvg() if text is None else make("algorithm", text, ALGORITHMS)
    if not callable(getattr(made, "local", None)) or not callable(getattr(made, "optimizers", None)):
        raise UsageError(f"algorithm {text}: the class has not both halves, local() and optimizers()")
    algorithm: Algorithm = made
    return algorithm
