"""Logit adjustment: a loss that does not teach which labels are frequent on this device.

    loss(f(x) + tau log pi, y),    pi[c] = examples of label c here / examples here

Logit adjustment (arXiv 2007.07314) by a worker's own labels, akin to FedLC (arXiv 2209.00189). With plain
cross-entropy each worker teaches its own label frequencies, which other workers' updates have to undo. With tau =
1 the model's logits f(x) are free of them. A label without examples here is not unlearned, because the softmax
leaves it out.

The rule: the adjustment is part of training alone. Scores are those of the logits as they are.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedgrpc.errors import TaskError

# Share of a label without examples. Its logit falls by 18 tau, which every number format can hold.
_ABSENT = 1e-8


class LabelAdjustment:
    """Adds `tau` times the log of each label's share to logits; `labels` [N] are the worker's own.

    Raises:
        TaskError: the labels are no class indices.
    """

    def __init__(self, labels: np.ndarray, tau: float) -> None:
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or not labels.size or labels.min() < 0:
            raise TaskError("label_adjustment is for tasks whose targets are class indices, one of each example")
        self._counts = np.bincount(labels)
        self._tau = tau
        self._added: Tensor | None = None

    def __call__(self, outputs: Tensor) -> Tensor:
        """Adjust `outputs` [B, classes] for the loss. Raises `TaskError` for other shapes."""
        if self._added is None:
            self._added = self._of(outputs)
        return outputs + self._added

    def _of(self, outputs: Tensor) -> Tensor:
        if outputs.ndim != 2 or outputs.shape[1] < len(self._counts):
            raise TaskError(
                f"label_adjustment needs outputs [batch, classes] of {len(self._counts)} classes or more, "
                f"not {list(outputs.shape)}"
            )
        shares = np.full(outputs.shape[1], _ABSENT)
        seen = np.flatnonzero(self._counts)
        shares[seen] = self._counts[seen] / self._counts.sum()
        added = torch.from_numpy(self._tau * np.log(shares))
        return added.to(dtype=outputs.dtype, device=outputs.device)
