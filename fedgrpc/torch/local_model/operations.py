"""Effects of torch's functions on channels, by name.

The rule: a handler returns True only where it is sure of the effect. Otherwise the caller keeps the full width of
the channels that go in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from fedgrpc.torch.local_model.graph import Axes, Graph, Node, Row

Handler = Callable[[Graph, Any, tuple[Any, ...], Mapping[str, Any]], bool]


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, name: str, default: Any = None) -> Any:
    return args[place] if place < len(args) else kwargs.get(name, default)


def _same_axes(graph: Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Handle elementwise functions of one tensor, and pooling: each channel stays by itself."""
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


def _broadcast(graph: Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Handle +, -, *, /: axes of equal extent are joined; an axis of one element follows the other operand's."""
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
    for each in bare:  # a learned scale or bias takes the axes of the other operand
        own = rows[out.dim() - each.dim() :]
        graph.state(each, [row if extent > 1 else None for row, extent in zip(own, each.shape, strict=True)])
    graph.set(out, rows)
    return True


def _linear(graph: Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    source, weight = args[0], _argument(args, kwargs, 1, "weight")
    if not graph.is_state(weight):
        return False
    rows = graph.fresh(weight.shape[0])
    graph.state(weight, (rows, graph.axes(source)[-1]))
    graph.state(_argument(args, kwargs, 2, "bias"), (graph.axes(weight)[0],))
    graph.set(out, (*graph.axes(source)[:-1], graph.axes(weight)[0]))
    return True


def _conv(graph: Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Handle plain and depthwise convolutions. Other grouped ones keep the full width of their channels."""
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


def _batch_norm(graph: Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    names = ("running_mean", "running_var", "weight", "bias")
    for place, name in enumerate(names, start=1):
        tensor = _argument(args, kwargs, place, name)
        if tensor is not None and not graph.is_state(tensor):
            return False
        graph.state(tensor, (graph.axes(args[0])[1],))
    graph.set(out, graph.axes(args[0]))
    return True


def _group_norm(graph: Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
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


def _layer_norm(graph: Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    axes = graph.axes(args[0])
    for place, name in enumerate(("weight", "bias"), start=2):
        graph.state(_argument(args, kwargs, place, name), axes[len(axes) - len(args[1]) :])
    graph.set(out, axes)
    return True


def _embedding(graph: Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    ids, weight = args[0], _argument(args, kwargs, 1, "weight")
    if not graph.is_state(weight):
        return False
    graph.state(weight, (None, graph.fresh(weight.shape[1])))
    graph.set(out, (*graph.axes(ids), graph.axes(weight)[1]))
    return True


def _flatten(graph: Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    source = args[0]
    start = _argument(args, kwargs, 1, "start_dim", 0) % source.dim()
    end = _argument(args, kwargs, 2, "end_dim", -1) % source.dim()
    axes = graph.axes(source)
    merged = _merged(axes[start : end + 1], tuple(source.shape[start : end + 1]))
    if merged is _UNKNOWN:
        return False
    graph.set(out, (*axes[:start], merged, *axes[end + 1 :]))
    return True


def _reshape(graph: Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Handle merging the last axes into one of size -1. An explicit size would not fit a narrower model."""
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
_MOST_REPETITIONS = 64


def _merged(axes: Axes, shape: tuple[int, ...]) -> Row | None:
    """Return the row of axes that become one; `_UNKNOWN` where channels lie along more than one of them."""
    places = [place for place, row in enumerate(axes) if row is not None]
    if not places:
        return None
    row, outer, inner = axes[places[0]], math.prod(shape[: places[0]]), math.prod(shape[places[0] + 1 :])
    # Every repetition is a further segment of the channel map, so their number is bounded.
    if len(places) > 1 or row is None or outer > _MOST_REPETITIONS:
        return _UNKNOWN
    return tuple((node, repeat * inner) for node, repeat in row) * outer


def _reduce(graph: Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Handle mean, sum, max and the like over axes without channels."""
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


def _cat(graph: Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    parts, dim = args[0], _argument(args, kwargs, 1, "dim", 0) % out.dim()
    rows: list[Row | None] = []
    for place in range(out.dim()):
        own = [graph.axes(part)[place] for part in parts]
        if place == dim and any(row is not None for row in own):
            known = zip(own, parts, strict=True)
            whole = [row or ((Node(part.shape[dim], frozen="no channels"), 1),) for row, part in known]
            rows.append(tuple(segment for row in whole for segment in row))
        else:
            joined = own[0]
            for row in own[1:]:
                joined = graph.join(joined, row) if joined is not None or row is not None else None
            rows.append(joined)
    graph.set(out, rows)
    return True


def _permute(graph: Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    source = args[0]
    order = args[1] if len(args) == 2 and isinstance(args[1], Sequence) else args[1:] or kwargs.get("dims", ())
    graph.set(out, [graph.axes(source)[dim] for dim in order])
    return True


def _transpose(graph: Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    axes = list(graph.axes(args[0]))
    one, other = _argument(args, kwargs, 1, "dim0"), _argument(args, kwargs, 2, "dim1")
    axes[one], axes[other] = axes[other], axes[one]
    graph.set(out, axes)
    return True


def _squeeze(graph: Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    source, dim = args[0], _argument(args, kwargs, 1, "dim")
    if not isinstance(dim, int):
        return False
    axes = list(graph.axes(source))
    if out.dim() < source.dim():
        del axes[dim]
    graph.set(out, axes)
    return True


def _unsqueeze(graph: Graph, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
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
HANDLERS: dict[str, Handler] = {
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
ALIASES = {
    **{each: each[1:] for each in ("iadd", "isub", "imul", "radd", "rsub", "rmul")},
    **dict.fromkeys(("truediv", "itruediv", "rtruediv", "true_divide"), "div"),
    **{"concat": "cat", "concatenate": "cat", "multiply": "mul", "subtract": "sub", "swapaxes": "transpose"},
}
