"""Payloads whose loss the next payload makes good: what receivers hold after one is told as it is written.

With e(x) for what decoding makes of an encoded x, the payload of a model w for receivers that hold h is e(w - h),
and they hold h + e(w - h) after it. The next difference is taken to that, so errors never add up (Tang et al.,
arXiv 1905.05957). A whole model is the same with h = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from fedgrpc.codec.encoding import Buffer
from fedgrpc.codec.layout import Array, Layout, TensorSpec
from fedgrpc.codec.payload import PayloadWriter, encode_tensor, naming
from fedgrpc.codec.recipe import Recipe
from fedgrpc.codec.uniform import Uniform
from fedgrpc.codec.values import add, left_out, part_filled, part_of, subtract

# A multiple of all pieces that a quantizer works in.
_KEPT_ELEMENTS: Final = 1 << 18

Tensors = Mapping[str, Array]
# Takes what receivers hold, tensor by tensor in the order of the layout, in one or more parts each.
Keep = Callable[[Array], None]
# Calls a function, perhaps in another thread and later; calls keep their order.
Submit = Callable[..., Any]


def _at_once(call: Callable[..., None], *args: Any) -> None:
    call(*args)


def add_difference(
    payload: PayloadWriter,
    model: Tensors,
    base: Tensors | None,
    layout: Layout,
    recipe: Recipe,
    rng: np.random.Generator,
    keep: Keep,
    submit: Submit = _at_once,
) -> None:
    """Add a model to a payload, or its difference to `base` of the same layout. `keep` gets what is then held.

    Arrays handed to `keep` are changed by nobody. `submit` makes the calls of `keep` and of the payload: it may
    defer them, and then they have to end before the payload is finished. Raises EncodeError.
    """
    for spec in layout:
        encoding = recipe.for_tensor(spec)
        if isinstance(encoding, Uniform) and spec.dtype == "float32":
            with naming(spec):
                data: Buffer = _quantize(model, base, spec, encoding, rng, lambda part: submit(keep, part))
        else:
            old = None if base is None else base[spec.name]
            new = model[spec.name]
            if old is not None and left_out(spec, new, old):
                submit(keep, new)
                continue
            wanted = new if old is None else subtract(spec, new, old)
            encoding, data = encode_tensor(spec, wanted, encoding, rng)
            # Decoded once here and once by each receiver: both then hold the same bits.
            arrives = encoding.decode(memoryview(data).toreadonly(), spec)
            submit(keep, arrives if old is None else add(spec, old, arrives))
        submit(payload.add, spec, encoding, data)


def _quantize(
    model: Tensors, base: Tensors | None, spec: TensorSpec, encoding: Uniform, rng: np.random.Generator, keep: Keep
) -> memoryview:
    """Encode one tensor a piece at a time, so that neither the difference nor its decoded form is ever whole."""
    wanted = part_of(model, spec.name)
    held_part = None if base is None else part_of(base, spec.name)
    held = after = np.empty(0, np.float32)
    filled = 0

    def subtract_part(out: Array, start: int) -> None:
        nonlocal held
        assert held_part is not None
        # Kept for `arrived`, which is called for this very piece before the next one is asked for.
        held = held_part(start, start + out.size)
        np.subtract(wanted(start, start + out.size), held, out=out)

    def arrived(start: int, values: Array, decoded: Array) -> None:
        nonlocal after, filled
        if not after.size:
            # A new array for each part: the one before may still wait to be written.
            after = np.empty(min(_KEPT_ELEMENTS, spec.size - start), np.float32)
        out = after[filled : filled + decoded.size]
        if held_part is None:
            out[:] = decoded
        else:
            np.add(held, decoded, out=out)
        filled += decoded.size
        if filled == after.size:
            keep(after)
            after, filled = np.empty(0, np.float32), 0

    # An overflow shows in the values, which are refused with the tensor's name.
    with np.errstate(over="ignore", invalid="ignore"):
        part = wanted if held_part is None else part_filled(subtract_part, np.float32)
        return encoding.encode_parts(part, spec.size, rng, arrived)
