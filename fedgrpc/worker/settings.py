"""Settings of a worker, checked once, on construction."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fedgrpc.codec.encoding import encoding_names
from fedgrpc.errors import UsageError
from fedgrpc.privacy.secure_policy import LEAST_DEVICES
from fedgrpc.protocol.devices import DeviceProfile
from fedgrpc.protocol.tasks import WorkerRole
from fedgrpc.rpc.address import Address, dialled
from fedgrpc.rpc.channel import Tls
from fedgrpc.rpc.retry import Backoff
from fedgrpc.runs.eligibility import parse
from fedgrpc.worker.throttle import Throttle

# A batch of more examples than that is a mistake; plans have 32 bits for it.
_MOST_BATCH: Final = (1 << 32) - 1
# No device has more neighbours in a secure sum.
_MOST_COLLUDING: Final = 1024
_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class WorkerSettings:
    """Settings of one worker. Times in seconds, sizes in bytes.

    `state_dir` keeps what survives a restart: unsent updates, the error-feedback residual, the held model. Each
    worker needs its own. `serve_address` is where the `Worker` service listens; None: nowhere. `poll_wait_s` caps
    the wait that the aggregator proposes, `stall_s` the time without a byte on a stream, `backoff` the waits
    between tries. `drain_s` is the time that the present task has after SIGTERM. `device` overrides measured
    fields of the profile by name. `encodings` are those that this worker offers to read and write.

    With `join`, a join token, the device becomes a member of the aggregator's fleet. From then on its certificate,
    which lies in `state_dir`, gives it its name and its role; `name` is what it asks for.

    The aggregator is not trusted with the device. A model of more than `max_model_bytes`, decoded, is refused
    (None: one whose training has no room in the memory that this process may use). So is a task whose batches
    have fewer than `min_batch_size` examples: the update of a single example reveals that example. While the
    device is not as `only_when` says (`fedgrpc.runs.eligibility`), it asks for no task. `allow_algorithms` has
    globs of the classes that a run may name as its algorithm, besides fedgrpc's own. With `only_secure` the device
    sends no update of training that is not masked for a secure sum. It joins none whose threshold lets the
    aggregator and `secure_colluding` of its neighbours learn more than the sum, and none of fewer than
    `secure_min_workers` devices, itself and its neighbours. A device with a certificate takes only neighbours'
    keys that are signed under `secure_ca` (without: the authorities of its link), and not those whose certificates
    are in the list `secure_crl`.

    Raises:
        UsageError: a value is out of range.
    """

    name: str
    aggregator: str
    state_dir: Path
    role: WorkerRole = WorkerRole.TRAINER
    tls: Tls | None = None
    join: str | None = field(default=None, repr=False)
    serve_address: str | None = "127.0.0.1:0"
    serve_tls: Tls | None = None
    device: Mapping[str, Any] = field(default_factory=dict)
    throttle: Throttle = field(default_factory=Throttle)
    exit_when_run_ends: bool = True
    poll_wait_s: float = 30.0
    stall_s: float = 300.0
    backoff: Backoff = field(default_factory=Backoff)
    drain_s: float = 20.0
    spool_max_updates: int = 8
    spool_max_bytes: int = 8 << 30
    spool_keep_s: float = 7 * 86_400.0
    encodings: tuple[str, ...] = field(default_factory=encoding_names)
    max_model_bytes: int | None = None
    min_batch_size: int = 1
    allow_algorithms: tuple[str, ...] = ()
    only_when: str = ""
    only_secure: bool = False
    secure_colluding: int = 0
    secure_min_workers: int = LEAST_DEVICES
    secure_ca: Path | None = None
    secure_crl: Path | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UsageError(f"the worker name {self.name!r} must be 1 to 64 of letters, digits, '.', '_' and '-'")
        dialled(self.aggregator)
        if self.serve_address is not None:
            Address.parse(self.serve_address)
        for name in (
            "poll_wait_s",
            "stall_s",
            "spool_max_updates",
            "spool_max_bytes",
            "spool_keep_s",
            "min_batch_size",
        ):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be above 0, not {getattr(self, name)}")
        if not self.min_batch_size <= _MOST_BATCH:
            raise UsageError(f"min_batch_size must be at most {_MOST_BATCH}, not {self.min_batch_size}")
        if not 0 <= self.secure_colluding <= _MOST_COLLUDING:
            raise UsageError(f"secure_colluding is from 0 to {_MOST_COLLUDING}, not {self.secure_colluding}")
        if not LEAST_DEVICES <= self.secure_min_workers <= _MOST_COLLUDING:
            raise UsageError(
                f"secure_min_workers is from {LEAST_DEVICES} to {_MOST_COLLUDING}, not {self.secure_min_workers}"
            )
        for encoding in self.encodings:
            if encoding not in encoding_names():
                raise UsageError(f"unknown encoding {encoding!r}; known are {', '.join(encoding_names())}")
        if self.max_model_bytes is not None and not self.max_model_bytes > 0:
            raise UsageError(f"max_model_bytes must be above 0, not {self.max_model_bytes}")
        if not self.drain_s >= 0:
            raise UsageError(f"drain_s must not be negative, not {self.drain_s}")
        DeviceProfile().with_overrides(self.device)
        try:
            parse(self.only_when)
        except UsageError as error:
            raise UsageError(f"only_when: {error}") from None
