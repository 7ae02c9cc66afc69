"""What devices add to secure sums, and what aggregators unmask, in this process."""

import numpy as np

from fedgrpc.aggregator import new_version
from fedgrpc.privacy.secure_vector import SecureVector


class Watched:
    """Records the integers of every device, the vectors that they are of, and the sums that aggregators unmask.

    Both run in this process.
    """

    def __init__(self, monkeypatch):
        self.plain, self.vectors, self.sums = [], [], []
        pieces, unmasked = SecureVector.pieces, new_version.unmasked_sum

        def watched_pieces(vector, update, examples, rng):
            found = list(pieces(vector, update, examples, rng))
            self.plain.append(np.concatenate(found))
            self.vectors.append(vector)
            return iter(found)

        def watched_sum(sum_, updates, load):
            total = unmasked(sum_, updates, load)
            self.sums.append((sum_, total.astype(np.uint64)))
            return total

        monkeypatch.setattr(SecureVector, "pieces", watched_pieces)
        monkeypatch.setattr(new_version, "unmasked_sum", watched_sum)
