"""Between a module's state_dict and numpy weights.

The rule: every persistent tensor crosses under its own state_dict name, in its own dtype. Tensors tied to each
other (one storage under several names) cross once, under the first of those names.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from fedgrpc.errors import LayoutError, UsageError
from fedgrpc.worker.trainer import Weights

# numpy has no types of its own for these; they cross as their bits.
_BY_BITS: dict[torch.dtype, tuple[torch.dtype, np.dtype]] = {
    torch.bfloat16: (torch.int16, np.dtype(ml_dtypes.bfloat16)),
    torch.float8_e4m3fn: (torch.uint8, np.dtype(ml_dtypes.float8_e4m3fn)),
    torch.float8_e5m2: (torch.uint8, np.dtype(ml_dtypes.float8_e5m2)),
}
_BACK = {numpy_dtype: (torch_dtype, bits) for torch_dtype, (bits, numpy_dtype) in _BY_BITS.items()}


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's own tensors (not copies) by name; of tied ones the first.

    Raises:
        UsageError: the module keeps state that is no tensor, or is not initialized yet.
    """
    found: dict[str, Tensor] = {}
    seen: set[tuple[object, ...]] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or isinstance(
            tensor, nn.UninitializedParameter | nn.UninitializedBuffer
        ):
            raise UsageError(f"the model's state {name!r} is no initialized tensor, so it cannot be shared")
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        found[name] = tensor.detach()
    return found


def weights_of(module: nn.Module) -> dict[str, np.ndarray]:
    """The module's tensors copied into numpy arrays."""
    return {name: _to_numpy(tensor) for name, tensor in named_tensors(module).items()}


def load_weights(module: nn.Module, weights: Weights) -> None:
    """Copy `weights` into the module, in place; on an error the module is as it was.

    Raises:
        LayoutError: names, shapes or dtypes are not those of the module.
    """
    own = named_tensors(module)
    if own.keys() != weights.keys():
        raise LayoutError(_difference(own.keys() - weights.keys(), weights.keys() - own.keys()))
    incoming = {name: _to_torch(weights[name]) for name in own}
    for name, tensor in own.items():
        given = incoming[name]
        if given.shape != tensor.shape or given.dtype != tensor.dtype:
            theirs, ours = _describe(given), _describe(tensor)
            raise LayoutError(f"tensor {name!r} is {theirs} in the run and {ours} in this worker's model")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(incoming[name])


def _to_numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype in _BY_BITS:
        bits, dtype = _BY_BITS[tensor.dtype]
        return tensor.view(bits).numpy().view(dtype).copy()
    return tensor.numpy().copy()


def _to_torch(array: np.ndarray) -> Tensor:
    array = np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray makes a scalar one-dimensional
    if array.dtype in _BACK:
        dtype, bits = _BACK[array.dtype]
        return torch.from_numpy(array.view(np.int16 if bits is torch.int16 else np.uint8).copy()).view(dtype)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _difference(missing: set[str], unexpected: set[str]) -> str:
    parts = []
    if missing:
        parts.append(f"the run lacks {_some(missing)}")
    if unexpected:
        parts.append(f"this worker's model lacks {_some(unexpected)}")
    return "this worker's model is not the run's: " + "; ".join(parts)


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
