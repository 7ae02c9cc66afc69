"""Whose update an error is the fault of.

The rule: whatever is done with the data of one update is done within `blaming` its token. What goes wrong there is
an `UnusableUpdate` that names the update, so that the round leaves out this one and goes on with the others.
Errors of the disk and of the process itself are nobody's fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import numpy as np

from fedgrpc.errors import FedgrpcError, NotFound, StorageError, UnusableUpdate
from fedgrpc.storage.update_file import StoredUpdate

_NOBODYS: Final = (UnusableUpdate, StorageError, NotFound, OSError, MemoryError)


@contextmanager
def blaming(token: str) -> Iterator[None]:
    """Around what uses the data of one update: an error there is an `UnusableUpdate` with its token."""
    try:
        yield
    except _NOBODYS:
        raise
    except Exception as error:
        raise UnusableUpdate(reason_of(error), token=token) from error


def reason_of(error: Exception) -> str:
    """One line for the operator; an error that nobody raised on purpose says its class, too."""
    return str(error) if isinstance(error, FedgrpcError) else f"{type(error).__name__}: {error}"


def most_to_blame(
    tensor: str, factors: Iterable[tuple[str, float]], load: Callable[[str], StoredUpdate]
) -> str | None:
    """The token of the update that adds most to an element of that tensor; None where none adds anything.

    `factors` are (token, factor) of the updates, each added times its factor. One tensor is read at a time.
    """
    most: Mapping[str, float] = {token: factor * _largest(load(token), tensor) for token, factor in factors}
    token = max(most, key=lambda each: most[each], default=None)
    return token if token is not None and most[token] > 0 else None


def _largest(update: StoredUpdate, tensor: str) -> float:
    with update.open() as reader:
        if tensor not in reader.names:
            return 0.0
        values = reader.tensor(tensor)
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.nan_to_num(np.abs(values.astype(np.float64)), nan=np.inf).max(initial=0.0))
