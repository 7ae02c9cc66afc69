"""What an error of the disk means for the content of a file.

The rule: no such error says that content is wrong. Only content that was read says so: a digest, a CRC, a size. A
file that cannot be read now (EIO, EMFILE, ENOMEM, EACCES, a mount that went away for a moment) is kept and tried
again later. Nothing is removed for it, and nothing is taken for absent.
"""

from __future__ import annotations

import errno
from typing import Final

_GONE: Final = frozenset({errno.ENOENT, errno.ENOTDIR})


def is_gone(error: OSError) -> bool:
    """Whether there is no such file. Any other error is for later."""
    return error.errno in _GONE
