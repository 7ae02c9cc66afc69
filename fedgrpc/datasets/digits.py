"""scikit-learn's digits: 1797 images of 8 x 8 pixels, 0 to 16, shipped with scikit-learn.

Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (1998).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from fedgrpc.datasets.dataset import Examples, LabelledData
from fedgrpc.errors import UsageError

_HELD_OUT_EVERY = 5


def load_digits() -> LabelledData:
    """Load inputs [N, 8, 8] uint8 from 0 to 16; every fifth image of each digit is held out (in all, 20 %).

    Raises:
        UsageError: scikit-learn is not installed.
    """
    pixels, labels = _read()
    order = np.argsort(labels, kind="stable")
    rank_in_label = np.empty(len(labels), dtype=np.int64)
    starts = np.searchsorted(labels[order], labels[order], side="left")
    rank_in_label[order] = np.arange(len(labels)) - starts
    everything = Examples(pixels.reshape(-1, 8, 8), labels)
    held_out = rank_in_label % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
    return LabelledData(everything.take(np.flatnonzero(~held_out)), everything.take(np.flatnonzero(held_out)))


def _read() -> tuple[np.ndarray, np.ndarray]:
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise UsageError("the digits data set comes with scikit-learn: pip install 'fedgrpc[demo]'")
    # The file is read directly, because importing scikit-learn costs a small device seconds and 100 MB.
    path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if path.exists():
        table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
        return table[:, :-1], table[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits as load

    digits = load()
    return digits.data.astype(np.uint8), digits.target.astype(np.int64)
