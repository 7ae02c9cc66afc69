"""How the C library hands out memory, set for processes that pass chunks and tensors between threads.

By default glibc gives each thread an arena of its own, and takes pieces of a megabyte from the system and gives
them back again and again. The system clears each page anew: here that costs more than hashing what is then written
there. With one arena for all threads that keeps what a round of a large model needs, memory is reused.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

# <malloc.h>
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8

_ARENAS: Final = 1
# What is larger than this comes from the system, and goes back to it; glibc takes no more here.
_LARGE_BYTES: Final = 32 << 20
_KEPT_BYTES: Final = 256 << 20


def reuse_memory() -> bool:
    """Call it before threads start; False where the C library is not glibc, or the user has set it up."""
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    options = ((_M_ARENA_MAX, _ARENAS), (_M_MMAP_THRESHOLD, _LARGE_BYTES), (_M_TRIM_THRESHOLD, _KEPT_BYTES))
    return all(mallopt(option, value) for option, value in options)
