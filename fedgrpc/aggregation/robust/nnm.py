"""Nearest-neighbour mixing (Allouah et al., arXiv 2302.01772), before another rule.

    y_i = mean of the n - f updates nearest to x_i, itself among them;  then any rule on y_1 ... y_n

Mixing is linear, so the products of the y follow from those of the x: Y = M X, Y Y^T = M X X^T M^T.
"""

from __future__ import annotations

import numpy as np

from fedgrpc.aggregation.robust.rule import squared_distances


def mixing(gram: np.ndarray, f: int) -> np.ndarray:
    """Return M [n, n]: row i has the factors of the updates in y_i."""
    count = len(gram)
    kept = max(1, count - f)
    between = squared_distances(gram)
    # An update is its own nearest neighbour, also where others equal it.
    np.fill_diagonal(between, -1.0)
    nearest = np.argsort(between, axis=1, kind="stable")[:, :kept]
    matrix = np.zeros((count, count))
    np.put_along_axis(matrix, nearest, 1 / kept, axis=1)
    return matrix
