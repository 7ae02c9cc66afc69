"""The settings of an aggregator, checked when they are made, read once at the edge."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from fedgrpc.aggregation.update import AdmissionPolicy
from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import UsageError
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.rpc.channel import Tls

MIB = 1 << 20


@dataclass(frozen=True)
class TrainingPlan:
    """What every worker is asked to do in a training round; None leaves the choice to its learning task."""

    epochs: float | None = None
    max_steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    momentum: float | None = None
    proximal_mu: float = 0.0

    def __post_init__(self) -> None:
        for name in ("epochs", "max_steps", "batch_size", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} must be above 0, not {value:g}")
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise UsageError(f"momentum must be from 0 to below 1, not {self.momentum:g}")
        if not self.proximal_mu >= 0:
            raise UsageError(f"proximal_mu must not be negative, not {self.proximal_mu:g}")


@dataclass(frozen=True)
class Target:
    """A score at which the run may end early: `name >= value`, or `name <= value` when `at_least` is False."""

    name: str
    value: float
    at_least: bool = True

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read "accuracy>=0.95" or "loss<=0.1". Raises `UsageError`."""
        for sign in (">=", "<="):
            name, found, number = text.partition(sign)
            if found and name.strip():
                try:
                    return cls(name.strip(), float(number), sign == ">=")
                except ValueError:
                    break
        raise UsageError(f"a target metric looks like accuracy>=0.95 or loss<=0.1, not {text!r}")

    def met(self, metrics: Mapping[str, float]) -> bool:
        """Whether `metrics` has this score and it is good enough."""
        if self.name not in metrics:
            return False
        value = metrics[self.name]
        return value >= self.value if self.at_least else value <= self.value


@dataclass(frozen=True)
class AggregatorSettings:
    """Everything an aggregator is told. Sizes in bytes, times in seconds."""

    data_dir: Path
    address: str = "127.0.0.1:50051"
    run_name: str = "default"
    rounds: int = 10
    policy: RoundPolicy = field(default_factory=RoundPolicy)
    plan: TrainingPlan = field(default_factory=TrainingPlan)
    initial_model: Path | None = None
    learning_task: str = ""
    model: str = ""
    download_recipe: str = "raw"
    upload_recipe: str = "raw"
    worker_weights: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    server_optimizer: str = "fedavg"
    server_learning_rate: float | None = None
    target: Target | None = None
    evaluate: bool = True
    max_update_norm: float | None = None
    seed: int = 0
    keep_versions: int = 3
    poll_wait_s: float = 30.0
    heartbeat_interval_s: float | None = None
    max_workers: int = 10_000
    max_uploads: int = 64
    max_payload_bytes: int = 4 << 30
    max_chunk_bytes: int = 4 * MIB
    max_upload_memory_bytes: int = 16 * MIB
    durable: bool = True
    stay: bool = False
    drain_s: float = 10.0
    tls: Tls | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UsageError(f"rounds must be at least 1, not {self.rounds}")
        for worker, weight in self.worker_weights.items():
            if not weight >= 0:
                raise UsageError(f"the weight of worker {worker!r} must not be negative, not {weight:g}")
        if self.keep_versions < 1:
            raise UsageError(f"keep_versions must be at least 1, not {self.keep_versions}")
        Recipe.parse(self.download_recipe)
        Recipe.parse(self.upload_recipe)

    @property
    def download(self) -> Recipe:
        """How models travel to workers."""
        return Recipe.parse(self.download_recipe)

    @property
    def admission(self) -> AdmissionPolicy:
        """What an update must keep to."""
        return AdmissionPolicy(math.inf if self.max_update_norm is None else self.max_update_norm)

    @property
    def heartbeat_s(self) -> float:
        """How often a worker with a task is to be heard of: by default a third of its lease, 5 s at most."""
        return self.heartbeat_interval_s or min(5.0, self.policy.lease_s / 3)
