"""Tokens of tasks: unguessable, and each says of which run its task is.

RUN-SECRET    the run's id, where that has 1 to 32 of letters and digits, and 144 random bits
"""

from __future__ import annotations

import re
import secrets
from typing import Final

_RUN: Final = re.compile(r"[A-Za-z0-9]{1,32}")
_BYTES: Final = 18


def new_token(run_id: str) -> str:
    """Return a token for a task of this run."""
    secret = secrets.token_urlsafe(_BYTES)
    # A leaf's run has the id that its parent gave, of whatever characters. A leaf has one run alone.
    return f"{run_id}-{secret}" if _RUN.fullmatch(run_id) else secret


def run_id_of(token: str) -> str:
    """Return the id of the run that a token may name; of a token that names none, it is of no run."""
    return token.partition("-")[0]
