"""Scores of a whole evaluation set, for `TorchTask.score`. Means over batches cannot say these.

The rule: outputs are logits [N, classes], or [N] for two classes, and targets are class indices [N]. A score that
the examples do not define, such as an area with one class alone, is NaN, which the worker leaves out.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def predicted(outputs: Tensor) -> Tensor:
    """Return the class of each example [N]: the largest logit, or whether the one logit is above 0."""
    return (outputs > 0).long() if outputs.dim() == 1 else outputs.argmax(1)


def f1_score(outputs: Tensor, targets: Tensor) -> float:
    """Return the mean F1 of the classes that occur in targets or predictions (macro F1).

    F1 = 2 TP / (2 TP + FP + FN) of each class.
    """
    found = predicted(outputs)
    scores = []
    for label in torch.unique(torch.cat([found, targets])):
        right = int(((found == label) & (targets == label)).sum())
        scores.append(2 * right / int((found == label).sum() + (targets == label).sum()))
    return sum(scores) / len(scores)


def auc(outputs: Tensor, targets: Tensor) -> float:
    """Return the area under the ROC curve of class 1 against class 0, from outputs [N] or [N, 2].

    It is the share of pairs of an example of each class in which that of class 1 has the larger output; equal ones
    count half (Hanley and McNeil, 1982).
    """
    margin = (outputs if outputs.dim() == 1 else outputs[:, 1] - outputs[:, 0]).double().numpy()
    positive = targets.numpy() == 1
    ones, zeros = int(positive.sum()), int((~positive).sum())
    if not ones or not zeros:
        return math.nan
    _, place, counts = np.unique(margin, return_inverse=True, return_counts=True)
    # The mean rank of those that are equal.
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return float((ranks[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))
