"""The generated solids are what they are called."""

from __future__ import annotations

import numpy as np
import pytest

from fedgrpc.datasets import shapes
from fedgrpc.datasets.shapes import SHAPES, load_shapes


def test_the_same_seed_makes_the_same_clouds_and_another_others() -> None:
    first, again, other = load_shapes(50, 32, 1), load_shapes(50, 32, 1), load_shapes(50, 32, 2)
    np.testing.assert_array_equal(first.train.inputs, again.train.inputs)
    assert (first.train.inputs != other.train.inputs).any()


def test_clouds_are_of_all_shapes_within_the_unit_ball_and_a_fifth_is_held_out() -> None:
    data = load_shapes(200, 64)
    assert data.train.inputs.shape == (160, 3, 64)
    assert data.train.inputs.dtype == np.float32
    assert len(data.held_out) == 40
    labels = np.concatenate([data.train.labels, data.held_out.labels])
    assert np.bincount(labels).tolist() == [40] * 5
    assert np.linalg.norm(data.train.inputs, axis=1).max() < 1.15


@pytest.mark.parametrize("name", SHAPES)
def test_points_lie_on_the_surface(name: str) -> None:
    points = SHAPES[name](np.random.default_rng(0), 4000)
    x, y, z = points.T
    radius = np.hypot(x, y)
    distance = {
        "sphere": np.hypot(radius, z) - 1,
        "cube": np.abs(points).max(axis=1) - 1,
        "cylinder": np.minimum(np.abs(radius - 1), np.abs(np.abs(z) - 1)),
        "torus": np.hypot(radius - 1, z) - 0.4,
        "cone": np.minimum(np.abs(z), np.abs(z - 2 * (1 - radius))),
    }[name]
    assert np.abs(distance).max() < 1e-9
    assert np.abs(points[:, :2].mean(axis=0)).max() < 0.1


def test_points_of_a_torus_are_spread_by_its_surface() -> None:
    """The outer half has (pi + 2 * tube) / 2 pi of it."""
    x, y, _ = shapes._torus(np.random.default_rng(0), 20_000).T
    outside = np.mean(np.hypot(x, y) > 1)
    assert outside == pytest.approx(0.5 + 0.4 / np.pi, abs=0.01)
