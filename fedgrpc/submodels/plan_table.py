"""Table of local-model plans: which device gets which, by its class or by what fits it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from fedgrpc import toml
from fedgrpc.errors import UsageError
from fedgrpc.submodels.channels import ChannelMap
from fedgrpc.submodels.plan import LocalModelPlan


@dataclass(frozen=True)
class PlanTable:
    """Plans by device class. Other devices get `default`, or the best of `automatic` that fits them.

    `automatic` goes from the most capable plan to the least. In TOML:

    [[automatic]]

    [[automatic]]
    width = 0.5

    [raspberry-pi-3]
    width = 0.25
    pruning.ratio = 0.5
    """

    default: LocalModelPlan = field(default_factory=LocalModelPlan)
    classes: Mapping[str, LocalModelPlan] = field(default_factory=dict)
    automatic: tuple[LocalModelPlan, ...] = ()

    @classmethod
    def from_toml(cls, text: str) -> PlanTable:
        """Parse the text form. Raises `UsageError`."""
        tables = toml.parse(text)
        ladder = toml.read_all(LocalModelPlan, tables.pop("automatic", []), "[[automatic]]")
        if "default" in tables and ladder:
            raise UsageError("beside plans in [[automatic]] there is no default one")
        plans = {name: toml.read(LocalModelPlan, table, f"the plan of {name}") for name, table in tables.items()}
        return cls(plans.pop("default", LocalModelPlan()), plans, ladder)

    @property
    def plans(self) -> tuple[LocalModelPlan, ...]:
        """All plans of the table."""
        return (self.default, *self.classes.values(), *self.automatic)

    def plan_of(self, device_class: str) -> LocalModelPlan:
        """Return the plan of a device class."""
        return self.classes.get(device_class, self.default)

    def known_to(self, parts: Collection[str]) -> PlanTable:
        """Return the table for a device that knows only these parts; other plans become the default one."""
        if all(plan.parts <= set(parts) for plan in self.plans):
            return self
        classes = {name: plan.known_to(parts) for name, plan in self.classes.items()}
        ladder = tuple(plan for plan in self.automatic if plan.parts <= set(parts))
        return PlanTable(self.default.known_to(parts), classes, ladder)

    def useless_for(self, channel_map: ChannelMap) -> frozenset[str]:
        """Return the parts of these plans that leave a model of that map whole: it has nothing for them to cut."""
        asked = frozenset[str]().union(*(plan.parts for plan in self.plans))
        cut = {
            "sub_model": any(not group.rank for group in channel_map.groups),
            "depth": channel_map.depth > 1,
            "rank": channel_map.rank > 1,
        }
        return frozenset(name for name, possible in cut.items() if name in asked and not possible)

    @property
    def trivial(self) -> bool:
        """True if every device trains the whole model as it is."""
        return all(plan == LocalModelPlan() for plan in self.plans)
