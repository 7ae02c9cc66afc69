"""A version of the model: what a committed round has written, and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from fedgrpc.rounds.best import Jump

_NOTHING: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Version:
    """A committed model version. `sha256` is that of its file; b"": it holds no model, one is to be asked for.

    `trained` rounds lead to it from the first model, whose content has the digest `first_model`. It is a copy of
    version `rolled_back_to`, if that is not 0.
    """

    version: int
    round: int
    sha256: bytes
    trained: int = 0
    norm: float = 0.0
    jump: Jump = Jump.NONE
    rolled_back_to: int = 0
    first_model: bytes = b""
    metrics: Mapping[str, float] = field(default_factory=lambda: _NOTHING)
    evaluator_metrics: Mapping[str, float] = field(default_factory=lambda: _NOTHING)

    @property
    def scores(self) -> Mapping[str, float]:
        """What is known of how good it is, evaluators first."""
        return {**self.metrics, **self.evaluator_metrics}
