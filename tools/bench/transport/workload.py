"""The work that every contestant does: models of ResNet-18's 102 tensors, and workers that add noise to them.

No torch and no training: a worker returns the model it was given plus Gaussian noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

# Width of the first stage; ResNet-18 itself has 64.
WIDTHS = {"0.28M": 10, "2.5M": 30, "11.2M": 64, "25.2M": 96}
_NOISE_STD = 0.01
# Longer than a zstd frame, so that compression never meets the same noise twice.
_NOISE_ELEMENTS = (1 << 21) + 257
_PIECE_ELEMENTS = 1 << 18

Array = np.ndarray


def shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the 102 tensors of a ResNet-18 of that width, in state-dict order."""
    found: dict[str, tuple[int, ...]] = {"conv1.weight": (width, 3, 3, 3), **_norm("bn1", width)}
    before = width
    for stage in range(4):
        channels = width << stage
        for block in range(2):
            name = f"layer{stage + 1}.{block}"
            found[f"{name}.conv1.weight"] = (channels, before, 3, 3)
            found |= _norm(f"{name}.bn1", channels)
            found[f"{name}.conv2.weight"] = (channels, channels, 3, 3)
            found |= _norm(f"{name}.bn2", channels)
            if stage and not block:
                found[f"{name}.downsample.0.weight"] = (channels, before, 1, 1)
                found |= _norm(f"{name}.downsample.1", channels)
            before = channels
    return {**found, "fc.weight": (10, before), "fc.bias": (10,)}


def _norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": (channels,) for part in parts}


def size_of(width: int) -> int:
    """Parameters."""
    return sum(int(np.prod(shape)) for shape in shapes(width).values())


def initial_model(width: int) -> dict[str, Array]:
    """Gaussian float32 tensors, the same for everyone."""
    rng = np.random.default_rng(0)
    return {name: _gaussian(rng, shape) for name, shape in shapes(width).items()}


def initial_pieces(width: int) -> Iterator[Array]:
    """The same end to end: flat pieces, none of which has elements of two tensors."""
    rng = np.random.default_rng(0)
    for shape in shapes(width).values():
        size = int(np.prod(shape))
        for start in range(0, size, _PIECE_ELEMENTS):
            yield _gaussian(rng, (min(_PIECE_ELEMENTS, size - start),))


def _gaussian(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return np.float32(0.05) * rng.standard_normal(shape, dtype=np.float32)


class Noise:
    """The noise of one worker, the same pattern shifted anew for each round."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._pattern = np.float32(_NOISE_STD) * rng.standard_normal(_NOISE_ELEMENTS, dtype=np.float32)
        self._at = seed % _NOISE_ELEMENTS

    def add_to(self, values: Array) -> Array:
        """values + noise as a new float32 array of the same shape."""
        out = np.empty(values.shape, np.float32)
        flat_in, flat_out = values.reshape(-1), out.reshape(-1)
        start = 0
        for size in self._sizes(flat_in.size):
            noise = self._pattern[self._at : self._at + size]
            np.add(flat_in[start : start + size], noise, out=flat_out[start : start + size])
            start, self._at = start + size, (self._at + size) % _NOISE_ELEMENTS
        return out

    def _sizes(self, left: int) -> Iterator[int]:
        while left:
            size = min(left, _NOISE_ELEMENTS - self._at)
            yield size
            left -= size

    def shift(self) -> None:
        """The next round meets the pattern elsewhere."""
        self._at = (self._at + 104_729) % _NOISE_ELEMENTS


def flat(model: Mapping[str, Array]) -> Array:
    """All tensors end to end."""
    return np.concatenate([values.reshape(-1) for values in model.values()])
