"""Cross-entropy with a weight for each class, for labels that are not equally frequent.

    loss = sum_i weight[y_i] loss_i / sum_i weight[y_i],    "balanced": weight[c] = N / (C n[c])

N examples here, n[c] of them of class c, C classes that there are here. A class without examples weighs nothing.
The rule: weights are part of training alone. Scores are of the plain loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedgrpc.errors import TaskError, UsageError

BALANCED = "balanced"


def weighted_cross_entropy(
    weights: Sequence[float] | str, labels: Callable[[], np.ndarray]
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss of outputs [B, classes] and targets [B]. `labels` gives those of the training examples.

    Raises:
        UsageError: the weights are neither numbers from 0 nor "balanced".
        TaskError: the labels are no class indices.
    """
    if isinstance(weights, str):
        if weights != BALANCED:
            raise UsageError(f"class_weights must be numbers or {BALANCED!r}, not {weights!r}")
        given = _balanced(labels())
    else:
        given = np.asarray(weights, np.float32)
        if given.ndim != 1 or not np.isfinite(given).all() or (given < 0).any():
            raise UsageError("class_weights must be one finite number from 0 for each class")

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        of_outputs = torch.zeros(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
        if len(given) > len(of_outputs) or (len(given) < len(of_outputs) and not isinstance(weights, str)):
            raise TaskError(f"there are {len(given)} class weights, and the model gives {len(of_outputs)} outputs")
        of_outputs[: len(given)] = torch.from_numpy(given).to(of_outputs)
        return functional.cross_entropy(outputs, targets, of_outputs)

    return loss


def _balanced(labels: np.ndarray) -> np.ndarray:
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not labels.size or labels.min() < 0:
        raise TaskError("balanced class_weights need targets that are class indices, one of each example")
    counts = np.bincount(labels)
    weights = labels.size / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return np.where(counts, weights, 0).astype(np.float32)
