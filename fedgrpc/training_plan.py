"""Training plan: what every worker of a run is asked to do in a training round.

The rule: a hyper-parameter is declared here once, with its default and the numbers that it may be. Its flag takes
name, type and default from here (`fedgrpc.cli.aggregator_settings`), its field on the wire its name
(`fedgrpc.protocol.plans`), and training finds it in its `TrainJob`, which is a plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Final

from fedgrpc.errors import UsageError

# No training is meant by more, and steps counted from it would overflow.
_MOST: Final = 1e9
_MOST_COUNT: Final = (1 << 32) - 1
_MOST_CHARS: Final = 400


@dataclass(frozen=True)
class _Allowed:
    """Values that a hyper-parameter may have, in words and as a test that NaN fails."""

    words: str
    test: Callable[[Any], bool]


_POSITIVE: Final = _Allowed(f"a number above 0, at most {_MOST:g}", lambda value: 0 < value <= _MOST)
_NOT_NEGATIVE: Final = _Allowed(f"a number from 0 to {_MOST:g}", lambda value: 0 <= value <= _MOST)
_BELOW_ONE: Final = _Allowed("from 0 to below 1", lambda value: 0 <= value < 1)
_TEXT: Final = _Allowed(
    f"1 to {_MOST_CHARS} printable characters", lambda text: text.isprintable() and 0 < len(text) <= _MOST_CHARS
)
_COUNT: Final = _Allowed(f"from 1 to {_MOST_COUNT}", lambda value: 1 <= value <= _MOST_COUNT)


def _parameter(allowed: _Allowed, default: Any = None) -> Any:
    return field(default=default, metadata={"allowed": allowed})


@dataclass(frozen=True)
class TrainingPlan:
    """Hyper-parameters. None leaves the choice to the learning task. Raises `UsageError` for other numbers.

    `algorithm` is the federated algorithm with its options (`fedgrpc.algorithms`), None is FedAvg.
    `label_adjustment` is the tau of logit adjustment by a worker's own labels (arXiv 2007.07314), 0 is the loss
    as it is. With `upload_reserve_s`, training ends once no more than this (or than a worker's uploads have
    taken) is left until the deadline.
    """

    epochs: float | None = _parameter(_POSITIVE)
    max_steps: int | None = _parameter(_COUNT)
    batch_size: int | None = _parameter(_COUNT)
    learning_rate: float | None = _parameter(_POSITIVE)
    momentum: float | None = _parameter(_BELOW_ONE)
    weight_decay: float | None = _parameter(_NOT_NEGATIVE)
    algorithm: str | None = _parameter(_TEXT)
    label_adjustment: float = _parameter(_NOT_NEGATIVE, 0.0)
    upload_reserve_s: float | None = _parameter(_NOT_NEGATIVE)

    def __post_init__(self) -> None:
        for each in fields(TrainingPlan):
            value, allowed = getattr(self, each.name), each.metadata["allowed"]
            if value is not None and not allowed.test(value):
                raise UsageError(f"{each.name} must be {allowed.words}, not {value}")
