"""Matrix products and convolutions that round every product and every partial sum, without a wide accumulator.

The rule: a sum takes its terms one after the other, in the order that each function states, and rounds after each.
So the result does not depend on the machine, and a step takes far longer than with one rounding per operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedgrpc.errors import UsageError

aten = torch.ops.aten

Round = Callable[[Tensor], Tensor]

# A step of a larger model takes minutes.
MOST_WEIGHTS = 1_000_000


def check_small(weights: int) -> None:
    """Raise UsageError for a model whose steps would take too long."""
    if weights > MOST_WEIGHTS:
        raise UsageError(
            f'accumulate = "format" is for models of at most {MOST_WEIGHTS} weights, not {weights}; leave it out'
        )


def product(left: Tensor, right: Tensor, rounded: Round) -> Tensor:
    """Return the matrix product, summed over the inner axis from its first element to its last."""
    found = (left[..., :, :0] @ right[..., :0, :]).zero_()
    for inner in range(left.shape[-1]):
        found = rounded(found + rounded(left[..., :, inner, None] * right[..., inner, None, :]))
    return found


def total(values: Tensor, dims: Sequence[int], keep: bool, rounded: Round) -> Tensor:
    """Return the sum over `dims`, in the order of their elements in memory."""
    gone = sorted({dim % values.dim() for dim in dims}) if dims else list(range(values.dim()))
    left = [dim for dim in range(values.dim()) if dim not in gone]
    terms = values.permute(*gone, *left).reshape(-1, *(values.shape[dim] for dim in left))
    found = torch.zeros_like(terms[0]) if len(terms) else values.new_zeros(terms.shape[1:])
    for term in terms:
        found = rounded(found + term)
    return found.reshape([1 if dim in gone else size for dim, size in enumerate(values.shape)]) if keep else found


class _Convolution:
    """A convolution over images as a matrix product: rows of weights with columns of patches, by group."""

    def __init__(self, weight: Tensor, options: Sequence[Any], rounded: Round) -> None:
        stride, padding, dilation, transposed, _, groups = options
        if transposed or weight.dim() != 4:
            raise UsageError('accumulate = "format" knows convolutions over images only, and none transposed')
        self._shape, self._rounded = weight.shape, rounded
        self._stride, self._padding, self._dilation, self._groups = stride, padding, dilation, groups
        self._rows = weight.reshape(groups, weight.shape[0] // groups, -1)

    def _columns(self, images: Tensor) -> Tensor:
        """Return [batch, group, channel x kernel row x kernel column, place]."""
        columns = functional.unfold(images, self._shape[2:], self._dilation, self._padding, self._stride)
        return columns.reshape(len(images), self._groups, -1, columns.shape[-1])

    def forward(self, images: Tensor, bias: Tensor | None) -> Tensor:
        """Sum over channels, kernel rows and kernel columns; the bias comes last."""
        found = product(self._rows, self._columns(images), self._rounded)
        height, width = (self._extent(images, axis) for axis in (0, 1))
        found = found.reshape(len(images), self._shape[0], height, width)
        return found if bias is None else self._rounded(found + bias[:, None, None])

    def _extent(self, images: Tensor, axis: int) -> int:
        covered = self._dilation[axis] * (self._shape[2 + axis] - 1) + 1
        extent: int = (images.shape[2 + axis] + 2 * self._padding[axis] - covered) // self._stride[axis] + 1
        return extent

    def of_weight(self, gradient: Tensor, images: Tensor) -> Tensor:
        """Sum over the batch, and in each image over the places."""
        columns = self._columns(images)
        right = columns.permute(1, 0, 3, 2).reshape(self._groups, -1, columns.shape[2])
        return product(self._of_groups(gradient), right, self._rounded).reshape(self._shape)

    def _of_groups(self, gradient: Tensor) -> Tensor:
        return gradient.transpose(0, 1).reshape(self._groups, self._shape[0] // self._groups, -1)

    def of_images(self, gradient: Tensor, images: Tensor) -> Tensor:
        """Sum over output channels, then over kernel rows and kernel columns."""
        batch, places = len(images), gradient.shape[2:]
        given = gradient.reshape(batch, self._groups, -1, places.numel())
        columns = product(self._rows.transpose(1, 2), given, self._rounded)
        columns = columns.reshape(batch, images.shape[1], *self._shape[2:], *places)
        pads = [2 * pad for pad in self._padding]
        found = images.new_zeros(batch, images.shape[1], images.shape[2] + pads[0], images.shape[3] + pads[1])
        for row in range(self._shape[2]):
            for column in range(self._shape[3]):
                at = [
                    slice(start := place * dilation, start + stride * (extent - 1) + 1, stride)
                    for place, dilation, stride, extent in zip(
                        (row, column), self._dilation, self._stride, places, strict=True
                    )
                ]
                reached = (slice(None), slice(None), *at)
                found[reached] = self._rounded(found[reached] + columns[:, :, row, column])
        top, left = self._padding
        return found[:, :, top : top + images.shape[2], left : left + images.shape[3]].contiguous()


def _mm(rounded: Round, left: Tensor, right: Tensor) -> Tensor:
    return product(left, right, rounded)


def _mv(rounded: Round, left: Tensor, right: Tensor) -> Tensor:
    return product(left, right[:, None], rounded)[..., 0]


def _dot(rounded: Round, left: Tensor, right: Tensor) -> Tensor:
    return product(left[None], right[:, None], rounded)[0, 0]


def _addmm(
    rounded: Round, bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    found = product(left, right, rounded)
    if alpha != 1:
        found = rounded(alpha * found)
    return rounded(found + (bias if beta == 1 else rounded(beta * bias)))


def _convolution(rounded: Round, images: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    return _Convolution(weight, options, rounded).forward(images, bias)


def _convolution_backward(
    rounded: Round, gradient: Tensor, images: Tensor, weight: Tensor, bias_sizes: Any, *options: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    *about, wanted = options
    convolution = _Convolution(weight, about, rounded)
    return (
        convolution.of_images(gradient, images) if wanted[0] else None,
        convolution.of_weight(gradient, images) if wanted[1] else None,
        total(gradient, (0, 2, 3), False, rounded) if wanted[2] else None,
    )


def _sum(rounded: Round, values: Tensor, dims: Sequence[int] | None, keep: bool = False, **_: Any) -> Tensor:
    return total(values, dims or (), keep, rounded)


# What torch makes of linear layers, convolutions, attention and the gradients of biases.
PRODUCTS: Mapping[Any, Callable[..., Any]] = {
    aten.mm.default: _mm,
    aten.bmm.default: _mm,
    aten.mv.default: _mv,
    aten.dot.default: _dot,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
    aten.sum.dim_IntList: _sum,
}
