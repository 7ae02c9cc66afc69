"""Finds the channel groups of any `nn.Module` by watching one forward pass.

The rule: what an operation does to channels is either known here or the channels it touches are kept whole, and
the reason is told. So a wrong sub-model is never built; at worst, a wider one than was asked for.

Each axis of each tensor is a row of segments, (node, repeat): the channels of a node, each of `repeat` elements.
Operations join nodes (an addition), lengthen rows (a concatenation), or freeze nodes (all they do not know).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fedgrpc.aggregation.channels import Axis, ChannelGroup, ChannelMap, Segment
from fedgrpc.errors import UsageError


@dataclass(frozen=True)
class Channels:
    """The channel groups of a model, and for each tensor with an axis that is kept whole, why."""

    map: ChannelMap
    whole: Mapping[str, str]


def trace_channels(module: nn.Module, example: Tensor) -> Channels:
    """Watch `module` score `example`, a batch of one or a few inputs.

    Raises:
        UsageError: the module cannot score the example.
    """
    graph = _Graph(module)
    with _evaluating(module), torch.no_grad():
        try:
            with _Watch(graph):
                outputs = module(example)
        except (RuntimeError, ValueError, TypeError) as error:
            raise UsageError(f"the model cannot be traced: {error}") from error
    for output in tree_leaves(outputs):
        if isinstance(output, Tensor):
            graph.freeze(graph.axes(output), "it is the model's output")
    return graph.channels()


@contextmanager
def _evaluating(module: nn.Module) -> Any:
    """Dropout does nothing and running statistics stay as they are."""
    training = {each: each.training for each in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for each, was in training.items():
            each.training = was


@dataclass
class _Node:
    """Channels that are kept or left out together; after a join, `into` leads to the one that stands for both."""

    channels: int
    blocks: int = 1
    frozen: str = ""
    into: _Node | None = None

    def root(self) -> _Node:
        node = self
        while node.into is not None:
            node = node.into
        return node


Row = tuple[tuple[_Node, int], ...]  # the segments of one axis
Axes = tuple[Row | None, ...]  # None: no channels lie along it


class _Graph:
    """What is known of every tensor seen so far."""

    def __init__(self, module: nn.Module) -> None:
        self.names: dict[int, str] = {}
        for name, tensor in module.state_dict(keep_vars=True).items():
            self.names.setdefault(id(tensor), name)
        self._known: dict[int, tuple[Tensor, Axes]] = {}

    def axes(self, tensor: Tensor) -> Axes:
        known = self._known.get(id(tensor))
        return (None,) * tensor.dim() if known is None else known[1]

    def is_state(self, tensor: object) -> bool:
        return id(tensor) in self.names

    def set(self, tensor: Tensor, axes: Sequence[Row | None]) -> None:
        """The tensor is kept as well: its id is then no other's."""
        self._known[id(tensor)] = (tensor, tuple(axes))

    def state(self, tensor: Tensor | None, axes: Sequence[Row | None]) -> None:
        """A parameter or buffer is used with these axes, perhaps for the second time."""
        if tensor is None:
            return
        if id(tensor) in self._known:
            axes = [self.join(mine, theirs) for mine, theirs in zip(self.axes(tensor), axes, strict=True)]
        self.set(tensor, axes)

    def fresh(self, channels: int) -> Row:
        return ((_Node(channels), 1),)

    def join(self, left: Row | None, right: Row | None) -> Row | None:
        """Both rows lie along one axis."""
        if left is None or right is None:
            self.freeze_row(left or right, "it meets an axis without known channels")
            return None
        same = len(left) == len(right) and all(
            a.root().channels == b.root().channels and m == n for (a, m), (b, n) in zip(left, right, strict=True)
        )
        if not same:
            for row in (left, right):
                self.freeze_row(row, "channels of different layouts are joined")
            return left
        for (a, _), (b, _) in zip(left, right, strict=True):
            self._merge(a.root(), b.root())
        return left

    def _merge(self, a: _Node, b: _Node) -> None:
        if a is b:
            return
        a.blocks = math.lcm(a.blocks, b.blocks)
        a.frozen = a.frozen or b.frozen
        b.into = a

    def freeze(self, axes: Axes, reason: str) -> None:
        for row in axes:
            self.freeze_row(row, reason)

    def freeze_row(self, row: Row | None, reason: str) -> None:
        for node, _ in row or ():
            node.root().frozen = node.root().frozen or reason

    def channels(self) -> Channels:
        numbers: dict[int, int] = {}
        groups: list[ChannelGroup] = []
        tensors: dict[str, tuple[Axis, ...]] = {}
        whole: dict[str, str] = {}

        def segment(node: _Node, repeat: int, name: str) -> Segment:
            root = node.root()
            if root.frozen:
                whole[name] = root.frozen
                return Segment(None, root.channels * repeat)
            if id(root) not in numbers:
                numbers[id(root)] = len(groups)
                groups.append(ChannelGroup(root.channels, root.blocks))
            return Segment(numbers[id(root)], repeat)

        for place, name in self.names.items():
            if place not in self._known:
                continue
            tensor, axes = self._known[place]
            rows: list[Axis] = []
            for row, extent in zip(axes, tensor.shape, strict=True):
                known = (Segment(None, extent),) if row is None else tuple(segment(*each, name) for each in row)
                rows.append(known)
            if any(each.group is not None for row in rows for each in row):
                tensors[name] = tuple(rows)
        return Channels(ChannelMap(tuple(groups), tensors), whole)


class _Watch(TorchFunctionMode):
    """Calls the handler of each function, by name; what has none freezes what goes in."""

    def __init__(self, graph: _Graph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", str(func)).strip("_")
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not tensors:
            return out
        handler = _HANDLERS.get(_ALIASES.get(name, name))
        if handler is None or not handler(self._graph, out, args, kwargs):
            for leaf in tree_leaves((args, dict(kwargs))):
                if isinstance(leaf, Tensor):
                    self._graph.freeze(
                        self._graph.axes(leaf), f"{name}() is not understood, or not with these sizes"
                    )
                    if self._graph.is_state(leaf):
                        self._graph.state(leaf, [None] * leaf.dim())
        return out


Handler = Callable[[_Graph, Any, tuple[Any, ...], Mapping[str, Any]], bool]


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, name: str, default: Any = None) -> Any:
    return args[place] if place < len(args) else kwargs.get(name, default)


def _same_axes(graph: _Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Elementwise functions of one tensor, and pooling: each channel stays by itself."""
    source = _argument(args, kwargs, 0, "input")
    outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    if not isinstance(source, Tensor) or any(each.dim() != source.dim() for each in outputs):
        return False
    if any(isinstance(other, Tensor) for other in tree_leaves((args[1:], dict(kwargs))) if other is not source):
        return False
    axes = graph.axes(source)
    for each in outputs:
        if any(row is not None and each.shape[at] != source.shape[at] for at, row in enumerate(axes)):
            return False
        graph.set(each, axes)
    return True


def _broadcast(graph: _Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """+, -, *, /: axes of equal extent are joined; an axis of one element follows the other's."""
    operands = [each for each in args[:2] if isinstance(each, Tensor)]
    rows: list[Row | None] = [None] * out.dim()
    bare = [each for each in operands if graph.is_state(each) and all(row is None for row in graph.axes(each))]
    for place in range(out.dim()):
        seen = []
        for operand in operands:
            axis = place - out.dim() + operand.dim()
            if axis >= 0 and operand.shape[axis] > 1 and not any(operand is each for each in bare):
                seen.append(graph.axes(operand)[axis])
        rows[place] = seen[0] if seen else None
        for other in seen[1:]:
            if other is not None or rows[place] is not None:
                rows[place] = graph.join(rows[place], other)
    for each in bare:  # a learned scale or bias takes the axes of what it meets
        own = rows[out.dim() - each.dim() :]
        graph.state(each, [row if extent > 1 else None for row, extent in zip(own, each.shape, strict=True)])
    graph.set(out, rows)
    return True


def _linear(graph: _Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    source, weight = args[0], _argument(args, kwargs, 1, "weight")
    if not graph.is_state(weight):
        return False
    rows = graph.fresh(weight.shape[0])
    graph.state(weight, (rows, graph.axes(source)[-1]))
    graph.state(_argument(args, kwargs, 2, "bias"), (graph.axes(weight)[0],))
    graph.set(out, (*graph.axes(source)[:-1], graph.axes(weight)[0]))
    return True


def _conv(graph: _Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Plain and depthwise convolutions; in other grouped ones the channels are kept whole."""
    source, weight = args[0], _argument(args, kwargs, 1, "weight")
    groups = _argument(args, kwargs, 6, "groups", 1)
    if not graph.is_state(weight) or source.dim() != weight.dim():
        return False
    incoming, spatial = graph.axes(source)[1], (None,) * (weight.dim() - 2)
    depthwise = groups > 1 and groups == source.shape[1] and incoming is not None
    if depthwise:
        multiplier = weight.shape[0] // groups
        outgoing: Row | None = tuple((node, repeat * multiplier) for node, repeat in incoming or ())
        graph.state(weight, (outgoing, None, *spatial))
    elif groups == 1:
        outgoing = graph.fresh(weight.shape[0])
        graph.state(weight, (outgoing, incoming, *spatial))
    else:
        graph.freeze_row(incoming, "it goes into a grouped convolution")
        outgoing = graph.fresh(weight.shape[0])
        graph.freeze_row(outgoing, "it is a grouped convolution")
        graph.state(weight, (outgoing, None, *spatial))
    outgoing = graph.axes(weight)[0]
    graph.state(_argument(args, kwargs, 2, "bias"), (outgoing,))
    graph.set(out, (graph.axes(source)[0], outgoing, *spatial))
    return True


def _batch_norm(graph: _Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    names = ("running_mean", "running_var", "weight", "bias")
    for place, name in enumerate(names, start=1):
        tensor = _argument(args, kwargs, place, name)
        if tensor is not None and not graph.is_state(tensor):
            return False
        graph.state(tensor, (graph.axes(args[0])[1],))
    graph.set(out, graph.axes(args[0]))
    return True


def _group_norm(graph: _Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    row, groups = graph.axes(args[0])[1], args[1]
    if row is not None and groups > 1:
        node = row[0][0].root()
        if len(row) == 1 and node.channels % math.lcm(node.blocks, groups) == 0:
            node.blocks = math.lcm(node.blocks, groups)
        else:
            graph.freeze_row(row, "its channels do not fall into the groups of a GroupNorm")
    for place, name in enumerate(("weight", "bias"), start=2):
        graph.state(_argument(args, kwargs, place, name), (row,))
    graph.set(out, graph.axes(args[0]))
    return True


def _layer_norm(graph: _Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    axes = graph.axes(args[0])
    for place, name in enumerate(("weight", "bias"), start=2):
        graph.state(_argument(args, kwargs, place, name), axes[len(axes) - len(args[1]) :])
    graph.set(out, axes)
    return True


def _embedding(graph: _Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    ids, weight = args[0], _argument(args, kwargs, 1, "weight")
    if not graph.is_state(weight):
        return False
    graph.state(weight, (None, graph.fresh(weight.shape[1])))
    graph.set(out, (*graph.axes(ids), graph.axes(weight)[1]))
    return True


def _flatten(graph: _Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    source = args[0]
    start = _argument(args, kwargs, 1, "start_dim", 0) % source.dim()
    end = _argument(args, kwargs, 2, "end_dim", -1) % source.dim()
    axes = graph.axes(source)
    merged = _merged(axes[start : end + 1], tuple(source.shape[start : end + 1]))
    if merged is _UNKNOWN:
        return False
    graph.set(out, (*axes[:start], merged, *axes[end + 1 :]))
    return True


def _reshape(graph: _Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Merging the last axes into one of size -1; a size written out would not fit a narrower model."""
    source = args[0]
    sizes = args[1] if len(args) == 2 and isinstance(args[1], Sequence) else args[1:]
    keep = len(sizes) - 1
    if (
        not sizes
        or sizes[-1] != -1
        or keep >= source.dim()
        or tuple(out.shape[:keep]) != tuple(source.shape[:keep])
    ):
        return False
    axes = graph.axes(source)
    if any(row is not None for row in axes[:keep]):
        return False
    merged = _merged(axes[keep:], tuple(source.shape[keep:]))
    if merged is _UNKNOWN:
        return False
    graph.set(out, (*axes[:keep], merged))
    return True


_UNKNOWN: Row = ()


def _merged(axes: Axes, shape: tuple[int, ...]) -> Row | None:
    """The row of axes that become one; `_UNKNOWN` where channels lie along more than one of them."""
    places = [place for place, row in enumerate(axes) if row is not None]
    if not places:
        return None
    row, outer, inner = axes[places[0]], math.prod(shape[: places[0]]), math.prod(shape[places[0] + 1 :])
    if len(places) > 1 or row is None or outer > 64:
        return _UNKNOWN
    return tuple((node, repeat * inner) for node, repeat in row) * outer


def _reduce(graph: _Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """mean, sum, max and the like over axes without channels."""
    source, dims = args[0], _argument(args, kwargs, 1, "dim")
    if dims is None or isinstance(dims, Tensor | float):
        return False
    gone = {dim % source.dim() for dim in (dims if isinstance(dims, Sequence) else (dims,))}
    axes = graph.axes(source)
    if any(axes[dim] is not None for dim in gone):
        return False
    for leaf in tree_leaves(out):
        if isinstance(leaf, Tensor):
            kept = leaf.dim() == source.dim()
            graph.set(leaf, [None if at in gone else row for at, row in enumerate(axes) if kept or at not in gone])
    return True


def _cat(graph: _Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    parts, dim = args[0], _argument(args, kwargs, 1, "dim", 0) % out.dim()
    rows: list[Row | None] = []
    for place in range(out.dim()):
        own = [graph.axes(part)[place] for part in parts]
        if place == dim and any(row is not None for row in own):
            known = zip(own, parts, strict=True)
            whole = [row or ((_Node(part.shape[dim], frozen="no channels"), 1),) for row, part in known]
            rows.append(tuple(segment for row in whole for segment in row))
        else:
            joined = own[0]
            for row in own[1:]:
                joined = graph.join(joined, row) if joined is not None or row is not None else None
            rows.append(joined)
    graph.set(out, rows)
    return True


def _permute(graph: _Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    source = args[0]
    order = args[1] if len(args) == 2 and isinstance(args[1], Sequence) else args[1:] or kwargs.get("dims", ())
    graph.set(out, [graph.axes(source)[dim] for dim in order])
    return True


def _transpose(graph: _Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    axes = list(graph.axes(args[0]))
    one, other = _argument(args, kwargs, 1, "dim0"), _argument(args, kwargs, 2, "dim1")
    axes[one], axes[other] = axes[other], axes[one]
    graph.set(out, axes)
    return True


def _squeeze(graph: _Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    source, dim = args[0], _argument(args, kwargs, 1, "dim")
    if not isinstance(dim, int):
        return False
    axes = list(graph.axes(source))
    if out.dim() < source.dim():
        del axes[dim]
    graph.set(out, axes)
    return True


def _unsqueeze(graph: _Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    axes = list(graph.axes(args[0]))
    axes.insert(_argument(args, kwargs, 1, "dim") % out.dim(), None)
    graph.set(out, axes)
    return True


# fmt: off
_BY_CHANNEL = (
    "relu", "relu6", "sigmoid", "tanh", "gelu", "silu", "mish", "elu", "selu", "celu", "leaky_relu",
    "hardtanh", "hardswish", "hardsigmoid", "softplus", "clamp", "clamp_min", "clamp_max", "neg", "abs",
    "exp", "log", "sqrt", "rsqrt", "square", "pow", "dropout", "dropout1d", "dropout2d", "dropout3d",
    "alpha_dropout", "feature_dropout", "contiguous", "clone", "to", "float", "double", "half", "bfloat16",
    "detach", "type_as", "identity", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d",
    "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "lp_pool2d", "interpolate", "instance_norm", "pad",
)
# fmt: on
_HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(_BY_CHANNEL, _same_axes),
    **dict.fromkeys(("add", "sub", "mul", "div", "maximum", "minimum"), _broadcast),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv),
    **dict.fromkeys(("mean", "sum", "max", "min", "amax", "amin"), _reduce),
    **dict.fromkeys(("view", "reshape"), _reshape),
    "linear": _linear,
    "batch_norm": _batch_norm,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "embedding": _embedding,
    "flatten": _flatten,
    "cat": _cat,
    "permute": _permute,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
}
_ALIASES = {
    **{each: each[1:] for each in ("iadd", "isub", "imul", "radd", "rsub", "rmul")},
    **dict.fromkeys(("truediv", "itruediv", "rtruediv", "true_divide"), "div"),
    **{"concat": "cat", "concatenate": "cat", "multiply": "mul", "subtract": "sub", "swapaxes": "transpose"},
}
