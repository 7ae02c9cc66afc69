"""Fashion-MNIST on a device that has the shares of several data sets in one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from fedgrpc.tasks.fashion_mnist import FashionMnist


class FashionBeside(FashionMnist):
    """`--data` is the share of another task; this one's lies beside it."""

    def data(self, path: Path | None) -> tuple[Dataset[Any], Dataset[Any] | None]:
        """Load the share. Raises `UsageError`."""
        return super().data(None if path is None else path.with_name("fashion_mnist.npz"))
