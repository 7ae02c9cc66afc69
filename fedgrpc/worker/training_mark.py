"""Mark of a training in progress, by which the next process knows what the last one was killed in.

The rule: a task that has killed two processes, while their machine ran on, takes more memory than there is. One
alone may have been killed by an operator, and a power cut is told by the system's boot id.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from fedgrpc.errors import LayoutError, TaskError
from fedgrpc.protocol.plans import local_model_plan_from_proto, local_task_to_proto
from fedgrpc.runs.task_context import LocalTask
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.v1 import round_pb2

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_TIMES = 2


@dataclass(frozen=True)
class Killed:
    """The plan and the token of a task, and how many processes in a row were killed in its training."""

    plan: LocalModelPlan
    token: str
    times: int


class TrainingMark:
    """The mark in one file. It is not synced: what survives a process is enough."""

    def __init__(self, path: Path) -> None:
        """Take up the mark that a former process has left."""
        self._path = path
        self._killed = _read(path)
        path.unlink(missing_ok=True)

    @property
    def too_large(self) -> LocalModelPlan | None:
        """The plan that this device has no memory for; None: not known of any."""
        return self._killed.plan if self._killed is not None and self._killed.times >= _TIMES else None

    def check(self, token: str) -> None:
        """Raise TaskError for the very task that takes more memory than there is."""
        if self._killed is not None and self._killed.token == token and self.too_large is not None:
            raise TaskError(f"{_TIMES} processes of this worker were killed in it: {self.too_large.to_line()}")

    @contextmanager
    def during(self, token: str, local: LocalTask) -> Iterator[None]:
        """Leave a mark within the block. A full disk leaves none."""
        before = self._killed
        times = before.times + 1 if before is not None and before.token == token else 1
        head = b"%b\n%b\n%d\n" % (_boot_id(), token.encode(), times)
        with suppress(OSError):
            self._path.write_bytes(head + local_task_to_proto(local).SerializeToString())
        try:
            yield
        finally:
            self._path.unlink(missing_ok=True)


def _read(path: Path) -> Killed | None:
    try:
        boot_id, token, times, content = path.read_bytes().split(b"\n", 3)
        plan = local_model_plan_from_proto(round_pb2.LocalModel.FromString(content))
        killed = Killed(plan, token.decode(), int(times))
    except (OSError, ValueError, DecodeError, LayoutError):
        return None
    return killed if boot_id and boot_id == _boot_id() else None


def _boot_id() -> bytes:
    """Return the id of the system's boot; empty where the system tells none, and no mark counts."""
    try:
        return _BOOT_ID.read_bytes().strip()
    except OSError:
        return b""
