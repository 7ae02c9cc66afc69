"""Noise of an update: what a number format did to it, measured against the same steps in float32."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from fedgrpc.trainer import Weights


def noise_ratio(update: tuple[Weights, Weights], exact: tuple[Weights, Weights], names: Collection[str]) -> float:
    """Return ||d - d32||^2 / ||d32||^2 over the tensors `names`; infinite where only the format moves anything.

    Each pair has the weights before and after: `update` in the format (d), `exact` in float32 (d32).
    """
    error = square = 0.0
    for name in names:
        (start, end), (start32, end32) = ((pair[0][name], pair[1][name]) for pair in (update, exact))
        exactly = np.subtract(end32, start32, dtype=np.float64)
        error += float(np.square(np.subtract(end, start, dtype=np.float64) - exactly).sum())
        square += float(np.square(exactly).sum())
    if not error > 0:
        return 0.0
    return error / square if square > 0 else np.inf
