"""Combinations of an algorithm with other settings of a run that have no meaning, each refused with its reason."""

from __future__ import annotations

from fedgrpc.aggregation.server_optimizer import PlainStep
from fedgrpc.algorithms.fedavg import FedAvg
from fedgrpc.algorithms.registry import algorithm_of
from fedgrpc.errors import UsageError
from fedgrpc.training_plan import TrainingPlan


def check_algorithm(
    plan: TrainingPlan,
    evaluate: bool,
    server_optimizer: str,
    *,
    bounds_norms: bool,
    clips: bool,
    whole_models: bool,
    buffer_size: int | None,
) -> None:
    """Raise `UsageError` unless the algorithm of `plan` goes with the rest of the run.

    `bounds_norms`: updates have a largest norm, to which they are scaled (`clips`) or over which they are refused.
    `whole_models`: every device trains the model as it is. `buffer_size`: so many updates make a version,
    without rounds.
    """
    algorithm = algorithm_of(plan.algorithm)
    name = plan.algorithm or "fedavg"
    algorithm.check(plan)
    if algorithm.normalizes and clips:
        raise UsageError(f"clip_norm goes without {name}, by which others' steps set the length of an update")
    if algorithm.companions and bounds_norms:
        raise UsageError(
            f"clip_norm and max_update_norm go without {name}: its companion tensors would count in the norm"
        )
    if (algorithm.companions or algorithm.keeps) and not whole_models:
        raise UsageError(
            f"local_models go without {name}: what it keeps on a device is of the whole model, "
            "and a sub-model has no part of it"
        )
    if algorithm.mixing(0) is not None and (buffer_size != 1 or clips):
        raise UsageError(
            f"{name} mixes in one whole model of a device at a time: set late = 'carry' and buffer_size = 1, and "
            "neither clip_norm nor clip_quantile"
        )
    if algorithm.uses_losses and not evaluate:
        raise UsageError(f"{name} needs the loss of each device: leave out --no-evaluate")
    inner = PlainStep()
    if server_optimizer != "fedavg" and algorithm.optimizers(inner, 1).get("") is not inner:
        raise UsageError(f"server_optimizer goes without {name}, which has a step of its own")


def goes_through_leaves(plan: TrainingPlan) -> bool:
    """Return whether the mean of what leaves send, each the mean of its devices, is that of all devices."""
    algorithm = algorithm_of(plan.algorithm)
    counts_devices = algorithm.companions or algorithm.keeps
    return not (counts_devices or algorithm.uses_losses or algorithm.uses_norms or algorithm.mixing(0) is not None)


def counts_differences_alone(plan: TrainingPlan) -> bool:
    """Return whether the algorithm's mean is that of differences, each as long as the device sent it."""
    algorithm, inner = algorithm_of(plan.algorithm), PlainStep()
    more = algorithm.companions or algorithm.keeps or algorithm.normalizes
    weighs = algorithm.uses_norms or algorithm.uses_losses or type(algorithm).scales is not FedAvg.scales
    return (
        not (more or weighs or algorithm.mixing(0) is not None) and algorithm.optimizers(inner, 1).get("") is inner
    )
