"""Names of versions, and which versions are kept. Pure.

RUN            the latest version of a run        RUN@best       the one with the best score
RUN@17         version 17                         RUN@final      the last one of a run that has ended
RUN@NAME       the one with the tag NAME          @best, @17     of the only run
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from fedgrpc.errors import NotFound, UsageError
from fedgrpc.runs.versions import Versions

LATEST: Final = "latest"
BEST: Final = "best"
FINAL: Final = "final"
_RESERVED: Final = frozenset({LATEST, BEST, FINAL})
_TAG: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
MAX_TAGS: Final = 200


@dataclass(frozen=True)
class Reference:
    """A version as people name it: a run ("": the only one), and a number, a word or a tag."""

    run: str
    name: str = LATEST

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read RUN, RUN@NAME or @NAME. Raises `UsageError`."""
        run, at, name = text.strip().rpartition("@") if "@" in text else (text.strip(), "", LATEST)
        if at and not name:
            raise UsageError(f"{text[:80]!r} names no version: write RUN@best, RUN@17 or RUN@TAG")
        return cls(run, name)

    def __str__(self) -> str:
        return f"{self.run}@{self.name}"


def checked_tag(name: str) -> str:
    """Return a name that a tag may have. Raises `UsageError`."""
    if not _TAG.fullmatch(name) or name in _RESERVED:
        words = ", ".join(sorted(_RESERVED))
        raise UsageError(
            f"a tag begins with a letter and has 1 to 64 of letters, digits, '.', '_' and '-', and is none of "
            f"{words}; not {name[:80]!r}"
        )
    return name


def resolve(name: str, versions: Versions, tags: Mapping[str, int], ended: bool) -> int:
    """Return the number of the version that a name means. Raises `NotFound`."""
    last, best = versions.last, versions.best
    if name.isascii() and name.isdigit():
        number = int(name[:20])
    elif name == FINAL and not ended:
        raise NotFound("the run has not ended, so no version is the final one; the newest is @latest")
    elif name in ("", LATEST, FINAL):
        number = last.version if last is not None else 0
    elif name == BEST:
        number = best.version if best is not None else 0
    elif name in tags:
        number = tags[name]
    else:
        raise NotFound(f"no version has the tag {name[:80]!r}; see `fedgrpc model list`")
    known = versions.get(number)
    if known is None or not known.sha256:
        shown = f"version {number}" if number else f"version {name[:80]!r}"
        raise NotFound(f"there is no {shown}, or it is kept no more; see `fedgrpc model list`")
    return number


def kept(
    last: int, count: int, oldest_given: int, named: Collection[int]
) -> tuple[frozenset[int], frozenset[int]]:
    """Return the versions whose everything is kept, and those beside them whose model alone is.

    The last `count` are kept, and all from `oldest_given` on, from which a task still trains. `named` are the best
    one, those with a tag, and those that a release or a rollback needs.
    """
    window = frozenset(range(min(last - count + 1, oldest_given), last + 1))
    return window, frozenset(named) - {0}


def out_of_patience(versions: Versions, patience: int | None) -> str:
    """Return why the run ends: none of the last `patience` versions was better; "" while it may improve."""
    best = versions.best
    if patience is None or best is None or not best.scores:
        return ""
    newest = max(number for number in versions if (each := versions.get(number)) is not None and each.scores)
    if newest - best.version < patience:
        return ""
    return f"no version of the last {patience} was better than version {best.version}"
