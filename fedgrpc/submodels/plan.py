"""Local-model plan of a device: width, pruning, clustering, quantization and number format of its local model.

Every part may be left out, and any combination is a plan. In TOML:

    width = 0.5                    # of the channels
    rule = "rolling"               # which ones: prefix, rolling, random, magnitude (structured pruning)
    personal_layers = ["head.*"]   # stay on the device
    trained_layers = ["fc*"]       # all others stay as they are given, and are not sent back
    depth = 2                      # the first blocks of a model with early exits
    rank = 4                       # the first directions of its adapters
    distillation = 1.0             # how much each exit learns from the others

    [pruning]
    ratio = 0.5
    scope = "layer"                # each layer alike; "global": the smallest of all layers

    [quantization]
    weight_bits = 8
    activation_bits = 8

    [clustering]
    clusters = 16
    layers = ["fc*"]

    [arithmetic]
    format = "float16"
    rounding = "stochastic"        # of the weights' steps; or float32_copy = true, which loses none
    loss_scale = 256.0             # or dynamic_loss_scale = true
    emulated = false               # true, for research: every operation rounded, at the cost of time
    accumulate = "carrier"         # "format": round every product and partial sum, too (emulated formats)

    [memory]
    micro_batches = 4              # parts of a batch, one after the other
    checkpoint = false             # true: blocks compute their activations again in the backward pass
    momentum = false               # whatever the run's momentum is

A large device may train the prefix sub-models of small devices along with its own model, in each step:

    nested = [0.5, 0.25]
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from fedgrpc import toml
from fedgrpc.errors import UsageError
from fedgrpc.submodels.channels import SubModel

SCOPES = ("layer", "global")
ROUNDINGS = ("nearest", "stochastic")
ACCUMULATORS = ("carrier", "format")
FORMATS = (
    *("float64", "float32", "float24", "float16", "bfloat16"),
    *("float8_e4m3", "float8_e4m3fn", "float8_e5m2"),
)
# torch computes in these, and needs no emulation of them.
SHORT_FORMATS = ("float16", "bfloat16")
NATIVE_FORMATS = ("float64", "float32", *SHORT_FORMATS)
_OTHER_FORMAT = re.compile(r"e\d{1,2}s\d{1,2}|fixed\d{1,2}\.-?\d{1,2}")
_ALL = ("*",)


@dataclass(frozen=True)
class Pruning:
    """Zero the `ratio` of weights that are smallest, in each of the `layers` or in all of them together."""

    ratio: float = 0.5
    scope: str = "layer"
    layers: tuple[str, ...] = _ALL

    def __post_init__(self) -> None:
        _check(0 < self.ratio < 1, f"a pruning ratio is above 0 and below 1, not {self.ratio:g}")
        _check(self.scope in SCOPES, f"pruning has the scope {' or '.join(SCOPES)}, not {self.scope!r}")
        _check_layers("pruning", self.layers)


@dataclass(frozen=True)
class Quantization:
    """Weights and layer inputs of few bits, trained by straight-through gradients; 0 bits change nothing."""

    weight_bits: int = 8
    activation_bits: int = 0
    layers: tuple[str, ...] = _ALL

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits"):
            bits = getattr(self, name)
            _check(bits == 0 or 2 <= bits <= 16, f"{name} are 2 to 16, or 0 for none, not {bits}")
        _check_layers("quantization", self.layers)


@dataclass(frozen=True)
class Clustering:
    """Number of different weights in each of the `layers`."""

    clusters: int = 16
    layers: tuple[str, ...] = _ALL

    def __post_init__(self) -> None:
        _check(2 <= self.clusters <= 256, f"a layer has 2 to 256 clusters, not {self.clusters}")
        _check_layers("clustering", self.layers)


@dataclass(frozen=True)
class Arithmetic:
    """Number format of all training: torch's own dtype if there is one, unless `emulated`.

    In a 16-bit dtype, a weight changes by no less than 1/256 or 1/2048 of its value, so small steps are lost.
    Stochastic rounding keeps them in the mean, and `float32_copy` exactly, for 4 bytes a weight. An emulated
    format saves neither memory nor time: it shows what a machine with the format would learn.

    Gradients are those of `loss_scale` times the loss, so that small ones do not vanish in the format. Steps are
    those without the scale (arXiv 1710.03740). A dynamic scale starts there, or as high as the format allows.

    An emulated operation sums in the format's carrier and rounds once. With `accumulate` "format", matrix products
    and convolutions round every product and every partial sum.
    """

    format: str = "float32"
    rounding: str = "nearest"
    emulated: bool = False
    loss_scale: float = 1.0
    dynamic_loss_scale: bool = False
    float32_copy: bool = False
    accumulate: str = "carrier"

    def __post_init__(self) -> None:
        short = self.format in SHORT_FORMATS and not self.emulated
        _check(
            short or not self.float32_copy, f"float32_copy is for {' and '.join(SHORT_FORMATS)}, not emulated ones"
        )
        _check(
            not self.float32_copy or self.rounding == "nearest", "a float32_copy loses no step, so none is rounded"
        )
        power = 1 <= self.loss_scale <= 2.0**100 and math.frexp(self.loss_scale)[0] == 0.5
        _check(power, f"a loss scale is a power of two from 1, which every format holds, not {self.loss_scale:g}")
        known = self.format in FORMATS or _OTHER_FORMAT.fullmatch(self.format)
        _check(bool(known), f"no number format {self.format!r}: choose {', '.join(FORMATS)}, or one like e5s11")
        accumulates = self.accumulate in ACCUMULATORS
        _check(accumulates, f"accumulate is {' or '.join(ACCUMULATORS)}, not {self.accumulate!r}")
        _check(self.rounding in ROUNDINGS, f"rounding is {' or '.join(ROUNDINGS)}, not {self.rounding!r}")


@dataclass(frozen=True)
class Memory:
    """Levers that trade time for memory and leave the model as it is.

    `micro_batches`: parts of each batch, whose gradients are added up to the batch's. `checkpoint`: the modules
    in an `nn.Sequential` that have layers of their own keep only their inputs for the backward pass (arXiv
    1604.06174). Without `momentum`, there are no velocities to keep.
    """

    micro_batches: int = 1
    checkpoint: bool = False
    momentum: bool = True

    def __post_init__(self) -> None:
        most = 1 << 16
        _check(1 <= self.micro_batches <= most, f"micro_batches are 1 to {most}, not {self.micro_batches}")


@dataclass(frozen=True)
class LocalModelPlan:
    """Plan of one device's local model. Its parts apply in this order; the default changes nothing."""

    width: float = 1.0
    rule: str = "prefix"
    personal_layers: tuple[str, ...] = ()
    pruning: Pruning | None = None
    clustering: Clustering | None = None
    quantization: Quantization | None = None
    arithmetic: Arithmetic | None = None
    nested: tuple[float, ...] = ()
    trained_layers: tuple[str, ...] = _ALL
    memory: Memory | None = None
    depth: int = 0
    rank: int = 0
    distillation: float = 0.0

    def __post_init__(self) -> None:
        self.sub_model(0)
        most = 1000
        _check(0 <= self.distillation <= most, f"distillation weighs 0 to {most}, not {self.distillation:g}")
        _check_layers("trained_layers", self.trained_layers)
        for width in self.nested:
            _check(0 < width < 1, f"a nested width is above 0 and below 1, not {width:g}")
        prefix = self.width == 1 or self.rule == "prefix"
        _check(not self.nested or prefix, f"prefixes cannot be nested in a sub-model of rule {self.rule!r}")
        _check(not self.nested or self.quantization is None, "nested widths are not trained with quantization")
        in_format = self.arithmetic is not None and self.arithmetic.accumulate == "format"
        _check(
            self.emulated or not in_format, 'accumulate = "format" is for emulated formats; add emulated = true'
        )
        if self.memory is not None and self.memory.checkpoint:
            # The second forward pass of a block would not see the weights, or random numbers, of the first.
            _check(self.quantization is None, "checkpoint goes without quantization")
            stochastic = self.arithmetic is not None and self.arithmetic.rounding == "stochastic"
            _check(not stochastic or not self.emulated, "checkpoint goes without emulated stochastic rounding")

    def sub_model(self, round_number: int) -> SubModel:
        """Return the sub-model that is trained in a round."""
        moving = 0 if self.rule in ("prefix", "magnitude") else round_number
        return SubModel(self.width, self.rule, moving, self.depth, self.rank)

    def with_sub_model(self, sub_model: SubModel) -> LocalModelPlan:
        """Return this plan for that sub-model, whatever its round."""
        if sub_model == self.sub_model(sub_model.round):
            return self
        return dataclasses.replace(
            self, width=sub_model.width, rule=sub_model.rule, depth=sub_model.depth, rank=sub_model.rank
        )

    @property
    def plain(self) -> bool:
        """True if the local model is just the global one or a sub-model of it."""
        return self.parts <= SUB_MODEL_PARTS

    @property
    def emulated(self) -> bool:
        """True if each operation is rounded to the number format, instead of torch computing in it."""
        asked = self.arithmetic
        if asked is None:
            return False
        stochastic = asked.rounding == "stochastic" and asked.format not in SHORT_FORMATS
        return asked.emulated or stochastic or asked.format not in NATIVE_FORMATS

    def known_to(self, parts: Collection[str]) -> LocalModelPlan:
        """Return this plan, or the default one for a device that does not know all of its parts."""
        return self if self.parts <= set(parts) else WHOLE_MODEL

    @cached_property
    def parts(self) -> frozenset[str]:
        """Parts that a device must know to follow the plan, as in `RegisterRequest.local_model_parts`."""
        needed = {
            "sub_model": self.width < 1,
            "depth": self.depth > 0,
            "rank": self.rank > 0,
            "distillation": self.distillation > 0,
            "personal_layers": bool(self.personal_layers),
            "trained_layers": self.trained_layers != _ALL,
            "nested_widths": bool(self.nested),
            **{name: getattr(self, name) is not None for name in _PARTS},
        }
        return frozenset(name for name, used in needed.items() if used)

    def is_personal(self, name: str) -> bool:
        """Return whether the tensor of that name never leaves the device."""
        return matches(name, self.personal_layers)

    def is_trained(self, name: str) -> bool:
        """Return whether training may change the tensor of that name."""
        return self.trained_layers == _ALL or matches(name, self.trained_layers)

    @property
    def is_of_layers(self) -> bool:
        """True if the plan leaves out channels, blocks or layers, so that their costs matter."""
        return not (self.sub_model(0).whole and self.is_trained_whole)

    @property
    def is_trained_whole(self) -> bool:
        """True if training may change every tensor."""
        return self.trained_layers == _ALL

    def is_kept_back(self, name: str) -> bool:
        """Return whether updates lack the tensor of that name: it is personal, or not trained."""
        return self.is_personal(name) or not self.is_trained(name)

    @classmethod
    def from_toml(cls, text: str) -> LocalModelPlan:
        """Parse the text form. Raises `UsageError`."""
        return cls.from_mapping(toml.parse(text))

    @classmethod
    def from_mapping(cls, table: Mapping[str, Any]) -> LocalModelPlan:
        """Convert a table of a TOML file. Raises `UsageError`."""
        return toml.read(cls, table, "the local-model plan")

    def to_line(self) -> str:
        """Format in one line: `width = 0.5, pruning.ratio = 0.3`."""
        table, parts = "", list[str]()
        for line in filter(None, self.to_toml().splitlines()):
            if line.startswith("["):
                table = line.strip("[]")
                parts.append(table)
            else:
                if parts and parts[-1] == table:
                    parts.pop()
                parts.append(f"{table}.{line}" if table else line)
        return ", ".join(parts) or "the whole model"

    def to_toml(self) -> str:
        """Format as TOML, with only the values that differ from the default."""
        lines, tables = [], []
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if each.name in _PARTS and value is not None:
                tables += [
                    "",
                    f"[{each.name}]",
                    *(_line(part.name, getattr(value, part.name)) for part in _of(value)),
                ]
            elif each.name not in _PARTS and value != each.default:
                lines.append(_line(each.name, value))
        return "\n".join([*lines, *tables]).strip() + "\n" if lines or tables else ""


_PARTS: dict[str, type] = {
    "pruning": Pruning,
    "clustering": Clustering,
    "quantization": Quantization,
    "arithmetic": Arithmetic,
    "memory": Memory,
}


# Parts that say which coordinates a device has.
SUB_MODEL_PARTS = frozenset({"sub_model", "depth", "rank"})
# The worker keeps personal layers itself. All other parts need the learning task.
WORKER_PARTS = frozenset({"personal_layers"})
TASK_PARTS = frozenset({*SUB_MODEL_PARTS, "nested_widths", "trained_layers", "distillation", *_PARTS})


def covers_all(plan: LocalModelPlan) -> bool:
    """Return whether an update by this plan covers every coordinate of the model."""
    return plan.parts.isdisjoint({*SUB_MODEL_PARTS, "pruning", "personal_layers", "trained_layers"})


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Return whether a tensor's name matches any of the patterns (fnmatch)."""
    return bool(patterns) and any(fnmatchcase(name, pattern) for pattern in patterns)


def _of(value: Any) -> tuple[dataclasses.Field[Any], ...]:
    return tuple(each for each in dataclasses.fields(value) if getattr(value, each.name) != each.default)


def _line(name: str, value: Any) -> str:
    if isinstance(value, tuple):
        return f"{name} = [{', '.join(_quoted(each) if isinstance(each, str) else repr(each) for each in value)}]"
    if isinstance(value, bool):
        return f"{name} = {str(value).lower()}"
    return f"{name} = {_quoted(value) if isinstance(value, str) else repr(value)}"


def _quoted(text: str) -> str:
    # JSON's escapes are TOML's; TOML alone wants DEL escaped, too.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _check_layers(part: str, layers: tuple[str, ...]) -> None:
    """Refuse an empty list, which a message could not express: without layers it means all of them."""
    _check(bool(layers), f"{part} is of some layers; leave the table out for none")


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise UsageError(message)


# The plan that changes nothing.
WHOLE_MODEL = LocalModelPlan()
