"""When Python looks for garbage, set for a process with many connections.

Reference counts free nearly everything; the collector only finds cycles. Each look at all objects stops the
process, for a tenth of a second with 2,000 connections, and by default that comes every few seconds, to find
nothing: what lives as long as a connection is no garbage.
"""

from __future__ import annotations

import gc
from typing import Final

# New objects until the youngest are looked at, and how many of these looks until the older ones are, and all.
_THRESHOLDS: Final = (2_000, 10, 1_000)


def collect_rarely() -> None:
    """Call it once everything is imported: that is never looked at again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
