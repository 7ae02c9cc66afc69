"""Settings of secure aggregation, and what they refuse."""

from __future__ import annotations

from dataclasses import dataclass

from fedgrpc.errors import UsageError
from fedgrpc.privacy.secure_sum import LEAST_NEIGHBOURS

# The sum of two devices tells each of them the other's update.
LEAST_DEVICES = LEAST_NEIGHBOURS + 1


@dataclass(frozen=True)
class SecurePolicy:
    """Rules by which a run adds up masked updates. Raises `UsageError`.

    Values of updates become integers of `secure_bits`; None: updates travel as they are. With `secure_weight_bits`
    an update weighs its examples, up to `max_examples`, in so many bits; with 0 all weigh the same.
    `secure_colluding` neighbours of a device may work with the aggregator and learn nothing more. A device has
    `secure_neighbours`, an even number; 0: all others up to 100 devices, and about 15 log2(n) of n above. A
    round's updates have about the share `secure_coordinates` of large tensors, the same elements on all devices.
    """

    secure_bits: int | None = None
    secure_weight_bits: int = 0
    secure_colluding: int = 0
    secure_neighbours: int = 0
    secure_coordinates: float = 1.0

    def __post_init__(self) -> None:
        if self.secure_bits is not None and not 2 <= self.secure_bits <= 24:
            raise UsageError(f"secure_aggregation is a number of bits from 2 to 24, not {self.secure_bits}")
        if not 0 <= self.secure_weight_bits <= 16:
            raise UsageError(f"secure_weight_bits is a number from 0 to 16, not {self.secure_weight_bits}")
        if self.secure_colluding < 0:
            raise UsageError(f"secure_colluding is a number from 0, not {self.secure_colluding}")
        if self.secure_neighbours and self.secure_neighbours not in range(4, 1024, 2):
            raise UsageError(
                f"secure_neighbours is 0 or an even number from 4 to 1022, not {self.secure_neighbours}"
            )
        if not 0.001 <= self.secure_coordinates <= 1:
            raise UsageError(f"secure_coordinates is a number from 0.001 to 1, not {self.secure_coordinates}")
        counts = self.secure_weight_bits or self.secure_colluding or self.secure_neighbours
        if not self.on and (counts or self.secure_coordinates < 1):
            raise UsageError(
                "secure_weight_bits, secure_colluding, secure_neighbours, secure_coordinates go with "
                "secure_aggregation"
            )

    @property
    def on(self) -> bool:
        """True if updates are masked."""
        return self.secure_bits is not None
