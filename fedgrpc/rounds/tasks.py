"""The tasks of a round: an immutable mapping from token to task, in slot order, that is cheap to change.

A round of a thousand workers sees tens of thousands of events. Tasks lie in chunks, of which a change copies one;
how many are in which phase is counted along the way.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, Mapping, ValuesView
from itertools import chain

from fedgrpc.rounds.events import TaskPhase
from fedgrpc.rounds.task import Task

_CHUNK = 32
_Key = tuple[TaskPhase, bool]


class Tasks(Mapping[str, Task]):
    """Tasks by token, in the order of their slots."""

    def __init__(self, tasks: Mapping[str, Task] | None = None) -> None:
        tasks = tasks or {}
        ordered = tuple(tasks.values())
        self._slots = {token: slot for slot, token in enumerate(tasks)}
        self._chunks = tuple(ordered[start : start + _CHUNK] for start in range(0, len(ordered), _CHUNK))
        self._counts = _counted({}, ordered, 1)

    def changed(self, changes: Mapping[str, Task]) -> Tasks:
        """These tasks with some replaced, or added at the end."""
        if not changes.keys() <= self._slots.keys():
            return Tasks({**self, **changes})
        chunks = list(self._chunks)
        before = []
        for token, task in changes.items():
            number, place = divmod(self._slots[token], _CHUNK)
            chunk = chunks[number]
            before.append(chunk[place])
            chunks[number] = (*chunk[:place], task, *chunk[place + 1 :])
        new = Tasks.__new__(Tasks)
        new._slots, new._chunks = self._slots, tuple(chunks)
        new._counts = _counted(_counted(self._counts, before, -1), changes.values(), 1)
        return new

    def count(self, phases: Iterable[TaskPhase], stale: bool) -> int:
        """How many are in one of these phases; those that are not stale, or all of them."""
        counts = self._counts
        return sum(counts.get((phase, False), 0) + (stale and counts.get((phase, True), 0)) for phase in phases)

    def __getitem__(self, token: str) -> Task:
        number, place = divmod(self._slots[token], _CHUNK)
        return self._chunks[number][place]

    def __contains__(self, token: object) -> bool:
        return token in self._slots

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def values(self) -> ValuesView[Task]:
        return self._as_dict().values()

    def items(self) -> ItemsView[str, Task]:
        return self._as_dict().items()

    def _as_dict(self) -> dict[str, Task]:
        return dict(zip(self._slots, chain.from_iterable(self._chunks), strict=True))

    def __repr__(self) -> str:
        return f"Tasks({self._as_dict()!r})"


def _counted(counts: Mapping[_Key, int], tasks: Iterable[Task], by: int) -> dict[_Key, int]:
    changed = dict(counts)
    for task in tasks:
        key = (task.phase, task.staleness > 0)
        changed[key] = changed.get(key, 0) + by
    return changed
