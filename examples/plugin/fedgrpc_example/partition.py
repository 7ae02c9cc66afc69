"""A partition (`--partition stripes:3`): every part has stripes of neighbouring examples, as of a time series."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedgrpc import FedgrpcError


@dataclass(frozen=True)
class Stripes:
    """Cut the examples into stripes in their order, and deal each part `per_part` of them in turn."""

    per_part: int = 1
    by_label: ClassVar[bool] = False
    by_group: ClassVar[bool] = False

    def split(self, labels, parts, seed):
        if len(labels) < parts * self.per_part:
            raise FedgrpcError(f"{len(labels)} examples cannot be cut into {parts * self.per_part} stripes")
        stripes = np.array_split(np.arange(len(labels)), parts * self.per_part)
        return [np.concatenate(stripes[part::parts]) for part in range(parts)]
