"""The aggregator under load: a process pinned to one core, and what the system says of it."""

from __future__ import annotations

import argparse
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tools.bench.load.workers import PATIENCE_S, WAIT_S, Update

_TICKS = os.sysconf("SC_CLK_TCK")


class Aggregator:
    """The process under load, pinned to one core, and what the system says of it."""

    def __init__(self, folder: Path, model: dict[str, np.ndarray], options: argparse.Namespace, aim: int) -> None:
        save_file(model, folder / "model.safetensors")
        ports = folder / "port"
        arguments = [
            *("aggregator", "--data-dir", folder / "run", "--address", "127.0.0.1:0", "--port-file", ports),
            *("--initial-model", folder / "model.safetensors", "--encoding", options.encoding, "--no-evaluate"),
            *("--rounds", 1_000_000, "--min-workers", aim, "--max-participants", aim, "--quorum", aim),
            *("--deadline", "10m", "--lease", "2m", "--max-workers", options.workers),
            *("--poll-wait", f"{WAIT_S:g}s", "--log-level", "warning", *options.aggregator_option),
        ]
        program = ["fedgrpc", *arguments]
        if options.bare:
            size_bytes = Update.of(model, options.encoding).size_bytes
            program = ["tools.bench.load.bare", "--port-file", ports]
            program += ["--updates", aim, "--model-bytes", size_bytes]
        pinned = ["taskset", "--cpu-list", str(options.core)] if options.core is not None else []
        command = [*pinned, sys.executable, "-m", *map(str, program)]
        self.process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        begun = time.monotonic()
        while not ports.exists() or not ports.read_text():
            if self.process.poll() is not None or time.monotonic() > begun + PATIENCE_S:
                raise SystemExit("the aggregator does not start")
            time.sleep(0.05)
        self.address = f"127.0.0.1:{ports.read_text().strip()}"
        self._largest_bytes = 0
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def _sample(self) -> None:
        while not self._ended.wait(0.05):
            self._largest_bytes = max(self._largest_bytes, self.rss_bytes)

    @property
    def rss_bytes(self) -> int:
        """Resident memory now."""
        return _rss_bytes(self.process.pid)

    @property
    def ingest_rss_bytes(self) -> int:
        """The same of all ingest processes together."""
        return sum(map(_rss_bytes, self._ingest))

    def largest_rss_bytes(self) -> int:
        """The largest sample since this was last asked."""
        largest, self._largest_bytes = self._largest_bytes, self.rss_bytes
        return largest

    @property
    def cpu_s(self) -> float:
        """User and system time so far."""
        return _cpu_s(self.process.pid)

    @property
    def ingest_cpu_s(self) -> list[float]:
        """The same of each ingest process."""
        return [_cpu_s(pid) for pid in self._ingest]

    @property
    def _ingest(self) -> list[int]:
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def end(self) -> None:
        self._ended.set()
        self._sampler.join()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _rss_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()
