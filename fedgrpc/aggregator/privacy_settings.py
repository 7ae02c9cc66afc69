"""Settings that would break the accounting of differential privacy, each refused by name. Pure.

The rule: what one device adds to a version has to be at most `clip_norm` over `privacy_cohort`, and which devices
take part may not depend on what any of them has sent. What leaves a device besides is listed in
docs/guide/privacy.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedgrpc.aggregation.robust.aggregation import aggregation_of
from fedgrpc.aggregation.server_optimizer import FedAvg as PlainStep
from fedgrpc.algorithms.fedavg import FedAvg
from fedgrpc.algorithms.registry import algorithm_of
from fedgrpc.errors import UsageError
from fedgrpc.submodels.plan import covers_all
from fedgrpc.training_plan import TrainingPlan

if TYPE_CHECKING:
    from fedgrpc.aggregator.settings import AggregatorSettings


def check_privacy(settings: AggregatorSettings) -> None:
    """Raise `UsageError` for a setting that does not go with privacy."""
    privacy, policy = settings.privacy, settings.policy
    if not privacy.on:
        if policy.poisson_rate is not None:
            raise UsageError("poisson_rate goes with privacy")
        if privacy.min_separation != 1 or not privacy.metrics:
            raise UsageError("min_separation and no metrics go with privacy")
        return
    plans = settings.local_models.plans
    refused = {
        "privacy needs clip_norm, the most that one update may weigh": settings.clip_norm is None,
        "clip_quantile goes without privacy: it tells of all norms": settings.clip_quantile is not None,
        "aggregation goes without privacy: only a sum changes by no more than one update": (
            aggregation_of(settings.aggregation) is not None
        ),
        "min_separation needs max_participants: with all devices in one round, none would be left for the next": (
            privacy.min_separation > 1 and policy.max_participants is None
        ),
        "weight goes without privacy, where every update weighs the same": bool(settings.worker_weights),
        "max_share goes without privacy, where every update weighs the same": policy.max_share is not None,
        "weight_aim goes without privacy, where every update weighs the same": policy.weight_aim is not None,
        "late = 'carry' goes without privacy: a device could be in one version twice": policy.late == "carry",
        "leaf goes without privacy: the mean of a leaf is of many devices": bool(settings.leaves),
        "local_models of a part go without privacy: few devices would share a coordinate": not all(
            map(covers_all, plans)
        ),
        "selection = 'oort' goes without privacy: it chooses by what devices have sent": (
            settings.choosing.selection == "oort"
        ),
        "target_epsilon needs rounds: noise is computed for all of them": (
            privacy.target_epsilon is not None and settings.rounds is None
        ),
        "no metrics go with no evaluate, and without target_metric and patience": not privacy.metrics
        and (settings.evaluate or settings.target is not None or settings.patience is not None),
        "poisson_rate goes with privacy = 'gaussian' and min_separation = 1": policy.poisson_rate is not None
        and (privacy.mechanism != "gaussian" or privacy.min_separation != 1),
    }
    for message, holds in refused.items():
        if holds:
            raise UsageError(message)
    if not counts_differences_alone(settings.plan):
        raise UsageError(
            f"algorithm {settings.plan.algorithm} goes without privacy: its mean is not of differences alone"
        )


def counts_differences_alone(plan: TrainingPlan) -> bool:
    """Return whether the algorithm's mean is that of differences, each as long as the device sent it."""
    algorithm, inner = algorithm_of(plan.algorithm), PlainStep()
    more = algorithm.companions or algorithm.keeps or algorithm.normalizes
    weighs = algorithm.uses_norms or algorithm.uses_losses or type(algorithm).scales is not FedAvg.scales
    return not (more or weighs) and algorithm.optimizers(inner, 1).get("") is inner
