"""Settings of an aggregator, checked when they are made. Pure.

The rule: what would break the run is refused by name, alone or together with another setting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from fedgrpc.aggregation.admission import AdmissionPolicy
from fedgrpc.aggregation.robust.aggregation import MEAN, aggregation_of
from fedgrpc.aggregation.server_optimizer import server_optimizer
from fedgrpc.aggregator.negotiation import Negotiation
from fedgrpc.aggregator.roles import Roles
from fedgrpc.algorithms.combinations import check_algorithm, counts_differences_alone, goes_through_leaves
from fedgrpc.algorithms.registry import algorithm_of
from fedgrpc.claims import WEIGHT
from fedgrpc.codec.manifest import Limits
from fedgrpc.errors import UsageError
from fedgrpc.identity.members import MAX_LIFE_S, MIN_LIFE_S, Lives
from fedgrpc.privacy.neighbours import degree_of, threshold_of
from fedgrpc.privacy.policy import PrivacyPolicy
from fedgrpc.privacy.secure_policy import LEAST_DEVICES, SecurePolicy
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.rounds.selection import SelectionPolicy
from fedgrpc.rounds.selector import UNIFORM
from fedgrpc.rpc.address import Address
from fedgrpc.rpc.channel import MAX_CHUNK_BYTES, Tls
from fedgrpc.rpc.relay import MAX_PROCESSES
from fedgrpc.runs.conditions import Condition
from fedgrpc.runs.eligibility import parse as parse_requires
from fedgrpc.runs.scheduler import Share
from fedgrpc.submodels.plan import covers_all
from fedgrpc.submodels.plan_table import PlanTable
from fedgrpc.training_plan import TrainingPlan

MIB = 1 << 20
# A chunk has to fit into a message, and a payload into what a reader of payloads takes.
_SIZES = {
    "max_chunk_bytes": MAX_CHUNK_BYTES,
    "max_payload_bytes": Limits().max_payload_bytes,
    "max_model_bytes": Limits().max_payload_bytes,
    "max_upload_memory_bytes": 1 << 40,
}
_LONGEST_NAME = 200


@dataclass(frozen=True)
class AggregatorSettings:
    """Settings of an aggregator. Sizes in bytes, times in seconds. Without `rounds` the run has no end."""

    data_dir: Path
    address: str = "127.0.0.1:50051"
    run_name: str = "default"
    rounds: int | None = 10
    policy: RoundPolicy = field(default_factory=RoundPolicy)
    choosing: SelectionPolicy = field(default_factory=SelectionPolicy)
    privacy: PrivacyPolicy = field(default_factory=PrivacyPolicy)
    secure: SecurePolicy = field(default_factory=SecurePolicy)
    plan: TrainingPlan = field(default_factory=TrainingPlan)
    local_models: PlanTable = field(default_factory=PlanTable)
    initial_model: Path | None = None
    learning_task: str = ""
    model: str = ""
    download_recipe: str = "int8+zstd"
    difference_recipe: str | None = None
    upload_recipe: str = "int8+zstd"
    worker_weights: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    noise_weights: bool = True
    staleness_exponent: float = 0.5
    server_optimizer: str = "fedavg"
    server_learning_rate: float | None = None
    target: Condition | None = None
    patience: int | None = None
    evaluate: bool = True
    max_update_norm: float | None = None
    max_examples: int | None = None
    clip_norm: float | None = None
    clip_quantile: float | None = None
    aggregation: str = MEAN
    evaluators: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    initialisers: tuple[str, ...] = ()
    seed: int = 0
    requires: str = ""
    priority: int = 0
    quota: int | None = None
    task_options: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    keep_versions: int = 3
    keep_rounds: int = 10_000
    poll_wait_s: float = 30.0
    heartbeat_interval_s: float | None = None
    max_workers: int = 10_000
    max_uploads: int = 64
    max_payload_bytes: int = 4 << 30
    max_model_bytes: int = 256 * MIB
    max_chunk_bytes: int = 2 * MIB
    max_upload_memory_bytes: int = 8 * MIB
    durable: bool = True
    stay: bool = False
    drain_s: float = 10.0
    ingest: int = 0
    tls: Tls | None = None
    insecure: bool = False
    track: tuple[str, ...] = ()
    certificate_life_s: float = Lives.device_s
    renewal_grace_s: float = Lives.grace_s

    def __post_init__(self) -> None:
        for name in ("rounds", "patience", "keep_versions", "keep_rounds", "max_workers", "max_uploads"):
            if (number := getattr(self, name)) is None:
                continue
            if number < 1:
                raise UsageError(f"{name} must be at least 1, not {number}")
            if number >= 1 << 32:
                raise UsageError(f"{name} must be at most {(1 << 32) - 1}, not {number}")
        for name, most in _SIZES.items():
            if not 1 <= getattr(self, name) <= most:
                raise UsageError(f"{name} must be from 1 to {most} bytes, not {getattr(self, name)}")
        if not self.run_name.isprintable() or not 1 <= len(self.run_name) <= _LONGEST_NAME:
            raise UsageError(f"run_name must be 1 to {_LONGEST_NAME} printable characters")
        for worker, weight in self.worker_weights.items():
            if not 0 <= weight <= WEIGHT.most:
                raise UsageError(
                    f"the weight of worker {worker!r} must be a number from 0 to {WEIGHT.most:g}, not {weight:g}"
                )
        if self.max_update_norm is not None and not 0 < self.max_update_norm < math.inf:
            raise UsageError(f"max_update_norm must be a number above 0, not {self.max_update_norm:g}")
        if self.max_examples is not None and not 1 <= self.max_examples < 1 << 63:
            raise UsageError(f"max_examples must be from 1 to {(1 << 63) - 1}, not {self.max_examples}")
        self._check_clipping()
        if not 0 <= self.seed < 1 << 32:
            raise UsageError(f"seed must be from 0 to {(1 << 32) - 1}, not {self.seed}")
        if self.tls is not None and self.tls.ca is None and not (self.insecure or self._listens.is_local):
            raise UsageError(
                "tls_cert needs tls_ca, by which callers are known; without both, the aggregator makes "
                "certificates itself, and with insecure anybody may call"
            )
        self._check_times()
        self._check_scales()
        self._check_aggregation()
        self._check_privacy()
        self._check_secure()
        self.negotiation()
        try:
            parse_requires(self.requires)
        except UsageError as error:
            raise UsageError(f"requires: {error}") from None
        Share(self.priority, self.quota)
        _ = self.roles

    def _no_leaves(self) -> str:
        """Return why no worker of the run may be an aggregator, of whose devices it sends one mean; "": it may."""
        reasons = {
            "aggregation and clip_quantile look at the update of each device": (
                aggregation_of(self.aggregation) is not None or self.clip_quantile is not None
            ),
            "privacy bounds what one device adds": self.privacy.on,
            "secure_aggregation without leaf sums up masked updates of devices": self.sums_here,
            f"{self.plan.algorithm} counts devices, or takes the update of each": not goes_through_leaves(
                self.plan
            ),
        }
        found = next((reason for reason, holds in reasons.items() if holds), "")
        return found and f"{found}, and a leaf sends one mean of many"

    @property
    def sums_here(self) -> bool:
        """True if updates of training come here masked, and this aggregator learns their sum alone."""
        return self.secure.on and not self.leaves

    @property
    def sums_at_leaves(self) -> bool:
        """True if updates of training are sums that leaves have of masked updates."""
        return self.secure.on and bool(self.leaves)

    def _check_clipping(self) -> None:
        """Shares and norms are bounded where every update is of the whole model and of a length of its own."""
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise UsageError(f"clip_norm must be a number above 0, not {self.clip_norm:g}")
        if self.policy.max_share is None:
            return
        if not all(covers_all(plan) for plan in self.local_models.plans):
            raise UsageError("max_share goes without local_models of a part: few workers share a coordinate")

    def _check_aggregation(self) -> None:
        """Check that the rule is defined for all updates that there may be."""
        rule, name = aggregation_of(self.aggregation), self.aggregation
        if self.clip_quantile is not None and not 0 < self.clip_quantile <= 1:
            raise UsageError(f"clip_quantile must be above 0, at most 1, not {self.clip_quantile:g}")
        if rule is None:
            return
        algorithm = algorithm_of(self.plan.algorithm)
        if algorithm.companions or algorithm.uses_losses or algorithm.mixing(0) is not None:
            raise UsageError(
                f"aggregation {name} goes without {self.plan.algorithm}, which takes each update as it is"
            )
        if not rule.by_coordinate and not all(covers_all(plan) for plan in self.local_models.plans):
            raise UsageError(
                f"aggregation {name} goes without local_models of a part: there is no distance between updates of "
                "different coordinates; median and trimmed-mean look at each coordinate by itself"
            )
        if rule.least > 1 and self.policy.quorum < rule.least:
            raise UsageError(f"aggregation {name} needs {rule.least} updates: set --quorum to that or more")

    def _check_scales(self) -> None:
        """Check the factors on updates, and that the algorithm goes with the other settings."""
        if not 0 <= self.staleness_exponent < math.inf:
            raise UsageError(f"staleness_exponent must be a number from 0, not {self.staleness_exponent:g}")
        server_optimizer(self.server_optimizer, self.server_learning_rate)
        clips = self.clip_norm is not None or self.clip_quantile is not None
        check_algorithm(
            self.plan,
            self.evaluate,
            self.server_optimizer,
            bounds_norms=clips or self.max_update_norm is not None,
            clips=clips,
            whole_models=not any(plan.parts for plan in self.local_models.plans),
            buffer_size=self.policy.buffer_size,
        )

    def _check_privacy(self) -> None:
        """Refuse each setting that would break the accounting of differential privacy.

        What one device adds to a version has to be at most clip_norm over privacy_cohort. Which devices take part
        may not depend on what any of them has sent. docs/guide/privacy.md lists what leaves a device besides.
        """
        privacy, policy = self.privacy, self.policy
        if not privacy.on:
            if policy.poisson_rate is not None:
                raise UsageError("poisson_rate goes with privacy")
            if privacy.min_separation != 1 or not (privacy.metrics or self.secure.on):
                raise UsageError("min_separation goes with privacy, no metrics with that or secure_aggregation")
            return
        plans = self.local_models.plans
        refused = {
            "privacy needs clip_norm, the most that one update may weigh": self.clip_norm is None,
            f"clip_quantile goes without privacy = {privacy.mechanism!r}, whose noise is for one clip norm": (
                privacy.mechanism != "gaussian" and self.clip_quantile is not None
            ),
            "clip_quantile is below 1 with privacy: else the clip norm would grow without end": (
                self.clip_quantile == 1
            ),
            "aggregation goes without privacy: only a sum changes by no more than one update": (
                aggregation_of(self.aggregation) is not None
            ),
            "min_separation needs max_participants: else all are in one round, and none is left for the next": (
                privacy.min_separation > 1 and policy.max_participants is None
            ),
            "weight goes without privacy, where every update weighs the same": bool(self.worker_weights),
            "max_share goes without privacy, where every update weighs the same": policy.max_share is not None,
            "weight_aim goes without privacy, where every update weighs the same": policy.weight_aim is not None,
            "late = 'carry' goes without privacy: a device could be in one version twice": policy.late == "carry",
            "local_models of a part go without privacy: few devices would share a coordinate": not all(
                map(covers_all, plans)
            ),
            "selection goes without privacy: it may choose by what devices have sent": (
                self.choosing.selection != UNIFORM
            ),
            "target_epsilon needs rounds: noise is computed for all of them": (
                privacy.target_epsilon is not None and self.rounds is None
            ),
            "no metrics go with no evaluate, and without target_metric, patience and min_new_examples": (
                not privacy.metrics and self._goes_by_reports
            ),
            "poisson_rate goes with privacy = 'gaussian' and min_separation = 1": policy.poisson_rate is not None
            and (privacy.mechanism != "gaussian" or privacy.min_separation != 1),
        }
        for message, holds in refused.items():
            if holds:
                raise UsageError(message)
        if not counts_differences_alone(self.plan):
            raise UsageError(
                f"algorithm {self.plan.algorithm} goes without privacy: its mean is not of differences alone"
            )

    @property
    def _goes_by_reports(self) -> bool:
        """True if a setting needs what devices report of their data beside updates."""
        goals = self.target is not None or self.patience is not None
        return self.evaluate or goals or bool(self.policy.min_new_examples)

    def _check_secure(self) -> None:
        """Refuse each setting that looks at single updates, or by which they differ in more than their values."""
        if not self.secure.on:
            return
        policy, privacy, quorum = self.policy, self.privacy, self.policy.quorum
        degree = degree_of(max(2, quorum), self.secure.secure_neighbours)
        refused = {
            "needs clip_norm, from which the first bounds of values follow": self.clip_norm is None,
            f"needs quorum = {LEAST_DEVICES} or more: of two updates, the sum tells each device the other's": (
                self.sums_here and quorum < LEAST_DEVICES
            ),
            "needs a larger quorum: one that the threshold for secure_colluding leaves able to answer": (
                self.sums_here and threshold_of(degree, self.secure.secure_colluding) > degree
            ),
            "with leaf goes without secure_neighbours and secure_coordinates: each leaf has its own": (
                self.sums_at_leaves and (self.secure.secure_neighbours > 0 or self.secure.secure_coordinates < 1)
            ),
            "with leaf goes without no metrics: a leaf tells its devices nothing of it": (
                self.sums_at_leaves and not privacy.metrics
            ),
            "goes without late = 'carry': masks cancel within one round": policy.late == "carry",
            "with privacy goes without secure_weight_bits: all updates weigh the same": (
                privacy.on and self.secure.secure_weight_bits > 0
            ),
            "with privacy goes without secure_coordinates: noise is accounted for whole updates": (
                privacy.on and self.secure.secure_coordinates < 1
            ),
            "goes without aggregation: rules look at single updates": aggregation_of(self.aggregation) is not None,
            "goes without clip_quantile, which looks at single updates": self.clip_quantile is not None,
            "goes without max_update_norm: devices clip to clip_norm, and no single update is seen": (
                self.max_update_norm is not None
            ),
            "goes without weight: a device puts its own weight into the sum": bool(self.worker_weights),
            "goes without max_share: weights are not seen": policy.max_share is not None,
            "goes without weight_aim: weights are not seen": policy.weight_aim is not None,
            "goes without local_models: all devices add the same vector": self.local_models != PlanTable(),
            "goes without difference_recipe: its devices train from the same values, not from what each held": (
                self.sums_here and self.difference_recipe is not None
            ),
            "needs one download_recipe: its devices train from the same values": (
                self.sums_here and len(self.negotiation().downlinks) > 1
            ),
            "goes without upload_reserve_s: training that ends by the clock is another one on each device": (
                self.plan.upload_reserve_s is not None
            ),
            "with max_examples needs secure_weight_bits, and the other way round": (
                (self.max_examples is None) != (self.secure.secure_weight_bits == 0)
            ),
            "with no metrics goes with no evaluate, and without target_metric, patience and min_new_examples": (
                not privacy.metrics and self._goes_by_reports
            ),
        }
        for message, holds in refused.items():
            if holds:
                raise UsageError(f"secure_aggregation {message}")
        if not counts_differences_alone(self.plan):
            raise UsageError(
                f"algorithm {self.plan.algorithm} goes without secure_aggregation: its mean is not of differences "
                "alone"
            )

    def _check_times(self) -> None:
        if not 0 < self.poll_wait_s < math.inf:
            raise UsageError(f"poll_wait_s must be a positive number of seconds, not {self.poll_wait_s:g}")
        if not 0 <= self.drain_s < math.inf:
            raise UsageError(f"drain_s must be a number of seconds from 0, not {self.drain_s:g}")
        if not 0 <= self.ingest <= MAX_PROCESSES:
            raise UsageError(f"ingest must be a number of processes from 0 to {MAX_PROCESSES}, not {self.ingest}")
        for name, least in (("certificate_life_s", MIN_LIFE_S), ("renewal_grace_s", 0.0)):
            if not least <= getattr(self, name) <= MAX_LIFE_S:
                raise UsageError(f"{name} must be from {least:g} to {MAX_LIFE_S:g}, not {getattr(self, name):g}")
        if self.heartbeat_interval_s is not None and not 0 < self.heartbeat_interval_s < self.policy.lease_s:
            lease_s = self.policy.lease_s
            raise UsageError(
                f"heartbeat_interval_s must be between 0 and the lease of {lease_s:g} s, or every lease runs out; "
                f"it is {self.heartbeat_interval_s:g}"
            )

    @property
    def share(self) -> Share:
        """Share of the fleet that the run is granted. Raises `UsageError`."""
        return Share(self.priority, self.quota)

    def negotiation(self) -> Negotiation:
        """Return the recipes of models and updates. Raises UsageError."""
        # A difference that loses nothing is none: devices of a secure sum get whole models.
        difference = "raw" if self.sums_here else self.difference_recipe
        return Negotiation(self.download_recipe, difference, self.upload_recipe)

    @property
    def _listens(self) -> Address:
        return Address.parse(self.address)

    @property
    def has_authority(self) -> bool:
        """True if the aggregator is the authority of its callers' certificates."""
        return self.tls is None and not self.insecure and not self._listens.is_local

    @cached_property
    def authenticated(self) -> bool:
        """True if callers have certificates, which say who they are and in which role."""
        return self.has_authority or (self.tls is not None and self.tls.ca is not None)

    @property
    def evaluators_named(self) -> bool:
        """True if evaluators are those of whom the operator said so: by name, or by their certificates."""
        return bool(self.evaluators) or self.authenticated

    @property
    def leaves_named(self) -> bool:
        """True if leaves are those of whom the operator said so: by name, or by their certificates."""
        return bool(self.leaves) or self.authenticated

    @property
    def lives(self) -> Lives:
        """Lifetimes of certificates."""
        return Lives(device_s=self.certificate_life_s, grace_s=self.renewal_grace_s)

    @cached_property
    def roles(self) -> Roles:
        """Workers that may be evaluators or aggregators, or give the first model."""
        no_trainers = "updates are summed at leaves, under masks" if self.sums_at_leaves else ""
        return Roles(self.evaluators, self.leaves, self.initialisers, self._no_leaves(), no_trainers)

    @property
    def admission(self) -> AdmissionPolicy:
        """Rules that an update must keep."""
        return AdmissionPolicy(math.inf if self.max_update_norm is None else self.max_update_norm)

    @property
    def heartbeat_s(self) -> float:
        """Seconds between the heartbeats of a worker with a task: by default a third of its lease, 5 s at most."""
        return self.heartbeat_interval_s or min(5.0, self.policy.lease_s / 3)
