"""Narrower copies of a module: its own class and code, with smaller tensors.

The rule: shapes decide. The aggregator, or `ChannelMap.select`, decides which channels a sub-model has. The module
only has to fit their number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial

import structlog
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from fedgrpc.errors import LayoutError, UsageError
from fedgrpc.submodels.channels import Axis, ChannelMap, Segment, SubModel, sub_shapes
from fedgrpc.torch.adapters import ranks_alone
from fedgrpc.torch.building import ModuleBuilder
from fedgrpc.torch.early_exits import names_held
from fedgrpc.torch.local_model.graph import Channels
from fedgrpc.torch.local_model.tracing import trace_channels
from fedgrpc.torch.module_copies import with_tensors
from fedgrpc.torch.weights import check_names, load_weights, uncompiled
from fedgrpc.trainer import Weights, weight_shapes

log = structlog.get_logger()

Shapes = Mapping[str, tuple[int, ...]]

# The trial: every group that can be narrower is narrower in it.
_TRIED = SubModel(0.5, rank=1)


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a module's state, by name."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict(keep_vars=True).items()}


def resized(module: nn.Module, shapes: Shapes) -> nn.Module:
    """Copy `module` with tensors of these shapes and no particular values. Tied tensors stay tied.

    Tensors that `shapes` leaves out keep their shape.

    Raises:
        UsageError: the module has no such tensor, or one with another number of axes.
    """
    own = shapes_of(module)
    for name, shape in shapes.items():
        if name not in own:
            raise UsageError(f"the model has no tensor {name!r} to resize")
        if len(shape) != len(own[name]):
            raise UsageError(f"tensor {name!r} has {len(own[name])} axes, not {len(shape)}")
    empty: dict[int, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        shape = tuple(shapes.get(name, own[name]))
        if shape != own[name] and id(tensor) not in empty:
            empty[id(tensor)] = _empty_like(tensor, shape)
    return _updated(with_tensors(module, empty))


def check_sub_model(channel_map: ChannelMap, whole: Shapes, shapes: Shapes) -> None:
    """Raise LayoutError unless `shapes` are those of a sub-model of the model with the shapes `whole`.

    Both have the same names.
    """
    kept: dict[int, int] = {}
    # In the model's order, so that the error names the weight before its bias. A file of weights is sorted by
    # name, and there a bias would decide how many channels its group keeps.
    for name, full in whole.items():
        shape = shapes[name]
        axes = channel_map.tensors.get(name, tuple((Segment(None, extent),) for extent in full))
        if len(shape) != len(full) or any(map(partial(_misfit, channel_map, kept), axes, shape)):
            raise LayoutError(
                f"tensor {name!r} is {list(shape)} in the run; this worker's model has {list(full)}, "
                "and no sub-model of it has that shape"
            )


def _misfit(channel_map: ChannelMap, kept: dict[int, int], axis: Axis, extent: int) -> bool:
    """Return whether no sub-model has so many elements of the axis.

    The first axis with one group says how many channels the group keeps; all other axes must agree.
    """
    grouped = [segment for segment in axis if segment.group is not None]
    if len(grouped) == 1 and grouped[0].group is not None:
        others = sum(segment.repeat for segment in axis if segment.group is None)
        kept.setdefault(grouped[0].group, (extent - others) // grouped[0].repeat)
    return extent != sum(_elements(segment, channel_map, kept) for segment in axis)


def _elements(segment: Segment, channel_map: ChannelMap, kept: Mapping[int, int]) -> int:
    if segment.group is None:
        return segment.repeat
    group = channel_map.groups[segment.group]
    count = kept.get(segment.group, group.channels)
    fits = 0 < count <= group.channels and count % group.blocks == 0
    return segment.repeat * (count if fits else -group.channels)


def check_runs(narrow: nn.Module, example: Tensor, outputs: tuple[int, ...]) -> None:
    """Score `example`. Raises UsageError unless the outputs have the shape of the whole model's outputs."""
    training = narrow.training
    narrow.eval()
    try:
        with torch.no_grad():
            shape = tuple(narrow(example).shape)
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"a narrower {type(narrow).__name__} does not run: {what}") from error
    finally:
        narrow.train(training)
    if shape != outputs:
        raise UsageError(f"a narrower {type(narrow).__name__} gives {shape}, the whole one {outputs}")


def _empty_like(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    values = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(values, requires_grad=tensor.requires_grad)
    return values


def _updated(module: nn.Module) -> nn.Module:
    for each in module.modules():
        _update_attributes(each)
    return module


def _update_attributes(module: nn.Module) -> None:
    """Correct the sizes that torch's own layers keep beside their tensors, since `forward` reads some of them."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _ConvNd) and not module.transposed:
        if module.groups > 1 and module.groups == module.in_channels:
            # A depthwise convolution has one group per input channel.
            multiplier = module.out_channels // module.in_channels
            module.groups = module.weight.shape[0] // multiplier
        module.out_channels = module.weight.shape[0]
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, _BatchNorm) and module.running_mean is not None:
        module.num_features = len(module.running_mean)
    elif isinstance(module, nn.GroupNorm) and module.affine:
        module.num_channels = len(module.weight)
    elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape


class SubModels:
    """The model of one `builder` and its sub-models. `example` gives a batch of its inputs."""

    def __init__(self, builder: ModuleBuilder, example: Callable[[], Tensor]) -> None:
        self._builder = builder
        self._example = example

    @property
    def whole_shapes(self) -> Shapes:
        """Shapes of the whole model, by every name of its tensors."""
        return shapes_of(uncompiled(self._builder.module))

    @cached_property
    def channels(self) -> Channels:
        """Channel groups of the model. Raises UsageError if it cannot be traced or does not run narrower.

        Zeros are enough to find them, so that a device needs no memory for a model that it never trains whole. A
        model that is not traced has the directions of its adapters alone.
        """
        try:
            return self._traced()
        except UsageError as error:
            ranks = ranks_alone(uncompiled(self._builder.module))
            if ranks is None:
                raise
            log.debug("channels of adapters alone are known", reason=str(error))
            return Channels(ranks, {})

    def _traced(self) -> Channels:
        example = self._example()
        if (whole := self._builder.whole) is not None:
            return _channels_of(uncompiled(whole), example)
        try:
            module = self._builder.blank()
            channels = trace_channels(module, example.cpu())
        except UsageError as error:
            log.warning("the whole model is built to find its channels", reason=str(error))
            return _channels_of(uncompiled(self._builder.initial()), example.cpu())
        _check_narrower(module, self._narrowed(channels.map, _TRIED), example.cpu())
        return channels

    def blank(self, sub_model: SubModel) -> nn.Module:
        """Build the module of a sub-model with zeros that take no memory. Raises UsageError as `channels`."""
        return self._builder.blank() if sub_model.whole else self._narrowed(self.channels.map, sub_model)

    def _narrowed(self, channel_map: ChannelMap, sub_model: SubModel) -> nn.Module:
        whole = {spec.name: spec.shape for spec in self._builder.layout}
        return _updated(self._builder.blank(sub_shapes(channel_map.select(sub_model), whole)))

    def loaded(self, weights: Weights) -> nn.Module:
        """Build the module of these weights, which may be those of a sub-model. Each tensor is read once.

        Raises:
            LayoutError: no sub-model of the model has such weights.
        """
        given = weight_shapes(weights)
        held = names_held(uncompiled(self._builder.module), self._builder.names.own.keys(), given)
        own = {spec.name: spec.shape for spec in self._builder.layout if spec.name in held}
        check_names(own.keys(), given.keys())
        if given != own:
            check_sub_model(self.channels.map, own, given)
        elif (whole := self._builder.whole) is not None and len(own) == len(self._builder.layout):
            load_weights(whole, weights)
            return whole
        filled = self._builder.filled(weights, given)
        return filled if given == own else _updated(filled)


def _channels_of(module: nn.Module, example: Tensor) -> Channels:
    channels = trace_channels(module, example)
    narrow = resized(module, sub_shapes(channels.map.select(_TRIED), shapes_of(module)))
    _check_narrower(module, narrow, example)
    return channels


def _check_narrower(module: nn.Module, narrow: nn.Module, example: Tensor) -> None:
    """Run the narrower copy, since a module's own code may rely on its sizes and only a run shows that."""
    with torch.no_grad():
        training = module.training
        outputs = module.eval()(example)
        module.train(training)
    check_runs(narrow, example, tuple(outputs.shape))
