"""`fedgrpc`, to be asked for what it holds: SIGUSR1 writes one line of JSON about this process.

Run as `python -m tests.faults.counted aggregator ...`.
"""

import asyncio
import gc
import json
import os
import signal
import threading

from fedgrpc.cli.main import main


def count(*_):
    counts = {
        "event": "counted",
        "tasks": len(asyncio.all_tasks(asyncio.get_running_loop())),
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
        "objects": len(gc.get_objects()),
    }
    # Not print: the signal may have come within another one.
    os.write(1, (json.dumps(counts) + "\n").encode())


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, count)
    main()
