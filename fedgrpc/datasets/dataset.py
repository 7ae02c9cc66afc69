"""Labelled data of every loader: training and held-out examples as numpy arrays, one row per example."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Examples:
    """`inputs` [N, ...] in the dtype the source has (uint8 for images), `labels` [N] int64.

    `groups` [N]: what examples belong together, such as their writer; None: not known.
    """

    inputs: np.ndarray
    labels: np.ndarray
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> Examples:
        """Copy the examples at `indices`."""
        groups = None if self.groups is None else self.groups[indices]
        return Examples(self.inputs[indices], self.labels[indices], groups)


@dataclass(frozen=True)
class LabelledData:
    """Data set for classification: examples to train on, and examples held out to score with."""

    train: Examples
    held_out: Examples
