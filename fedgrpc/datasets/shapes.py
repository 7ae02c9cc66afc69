"""Point clouds of five solids, made from a seed: a data set for models of 3D points without a download.

Points are evenly spread over a surface. The cloud is turned about the vertical, stretched by up to a fifth along
each axis, disturbed by noise, and scaled into the unit ball, as PointNet (arXiv 1612.00593) expects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from fedgrpc.datasets.dataset import Examples, LabelledData

_NOISE = 0.02
_STRETCH = 0.2
_HELD_OUT_SHARE = 0.2

Rng = np.random.Generator


def load_shapes(count: int = 2000, points: int = 128, seed: int = 0) -> LabelledData:
    """Make inputs [count, 3, points] float32 and labels by `SHAPES`, equally many of each; a fifth is held out."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(SHAPES)
    makers = tuple(SHAPES.values())
    clouds = np.stack([_cloud(makers[label](rng, points), rng) for label in labels]).astype(np.float32)
    order = rng.permutation(count)
    everything = Examples(clouds[order], labels[order].astype(np.int64))
    held_out = round(count * _HELD_OUT_SHARE)
    return LabelledData(everything.take(np.arange(held_out, count)), everything.take(np.arange(held_out)))


def _cloud(surface: np.ndarray, rng: Rng) -> np.ndarray:
    """Turn, stretch and disturb a surface's points [N, 3] into a cloud [3, N]."""
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    cloud = surface * rng.uniform(1 - _STRETCH, 1 + _STRETCH, 3) @ turn.T
    cloud = cloud - cloud.mean(axis=0)
    cloud /= np.linalg.norm(cloud, axis=1).max()
    cloud += rng.normal(scale=_NOISE, size=cloud.shape)
    return np.ascontiguousarray(cloud.T)


def _sphere(rng: Rng, count: int) -> np.ndarray:
    points = rng.normal(size=(count, 3))
    unit: np.ndarray = points / np.linalg.norm(points, axis=1, keepdims=True)
    return unit


def _cube(rng: Rng, count: int) -> np.ndarray:
    points = rng.uniform(-1, 1, (count, 3))
    points[np.arange(count), rng.integers(0, 3, count)] = rng.choice([-1.0, 1.0], count)
    return points


def _cylinder(rng: Rng, count: int) -> np.ndarray:
    """Draw from radius 1, height 2: the side has two thirds of the surface, each lid a sixth."""
    angle, lid = rng.uniform(0, 2 * np.pi, count), rng.random(count) < 1 / 3
    radius = np.where(lid, np.sqrt(rng.random(count)), 1.0)
    height = np.where(lid, rng.choice([-1.0, 1.0], count), rng.uniform(-1, 1, count))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), height], axis=1)


def _torus(rng: Rng, count: int, tube: float = 0.4) -> np.ndarray:
    """Draw from a ring of radius 1 with a tube, and reject some inner points, since the outside is larger."""
    around, across = rng.uniform(0, 2 * np.pi, count), np.empty(0)
    while len(across) < count:
        drawn = rng.uniform(0, 2 * np.pi, 2 * count)
        kept = drawn[rng.random(2 * count) * (1 + tube) < 1 + tube * np.cos(drawn)]
        across = np.concatenate([across, kept])[:count]
    radius = 1 + tube * np.cos(across)
    return np.stack([radius * np.cos(around), radius * np.sin(around), tube * np.sin(across)], axis=1)


def _cone(rng: Rng, count: int, height: float = 2.0) -> np.ndarray:
    """Draw from a closed cone of radius 1 at the foot."""
    slope = np.hypot(1.0, height)
    angle, foot = rng.uniform(0, 2 * np.pi, count), rng.random(count) < 1 / (1 + slope)
    radius = np.sqrt(rng.random(count))
    return np.stack(
        [radius * np.cos(angle), radius * np.sin(angle), np.where(foot, 0.0, height * (1 - radius))], axis=1
    )


SHAPES: Final[dict[str, Callable[[Rng, int], np.ndarray]]] = {
    "sphere": _sphere,
    "cube": _cube,
    "cylinder": _cylinder,
    "torus": _torus,
    "cone": _cone,
}
