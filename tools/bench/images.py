"""What the images take: their size on top of their base, and how long an aggregator takes to serve. Root, podman.

python -m tools.bench.images [--starts 9] [--base NAME]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from fedgrpc.cli.health import health_of
from fedgrpc.rpc.server import AGGREGATOR as SERVICE
from fedgrpc.words import size
from tools.containers.devices import AGGREGATOR
from tools.containers.network import Network
from tools.containers.podman import AGGREGATOR_IMAGE, WORKER_IMAGE, Container, podman, why_not

NAME = "fgcold"
BASE = "docker.io/library/python:3.11-slim-bookworm"
LITE_IMAGE = "localhost/fedgrpc-worker-lite:dev"
_GIVE_UP_S = 60.0


def image_bytes(image: str) -> int:
    """Unpacked, its base included."""
    text = podman("image", "inspect", image)
    assert text is not None
    return int(json.loads(text)[0]["Size"])


def cold_start(container: Container, address: str) -> tuple[float, float, int]:
    """Seconds from `podman run`, and from the start of its process, to SERVING; its memory then, bytes."""
    begun_s = time.time()
    container.start()
    until_s = begun_s + _GIVE_UP_S
    while health_of(address, SERVICE, 0.2, None) != "SERVING":
        if time.time() > until_s:
            raise SystemExit(f"not SERVING within {_GIVE_UP_S:.0f} s")
        time.sleep(0.005)
    serving_s = time.time()
    state = container.state()
    assert state is not None
    # Nine digits of a second, and an offset like "+0000 UTC" or "Z".
    started = datetime.fromisoformat(state["StartedAt"][:26].replace(" ", "T") + "+00:00")
    container.measure()
    return serving_s - begun_s, serving_s - started.timestamp(), container.peak_memory_bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=9)
    parser.add_argument("--base", default=BASE, help="the image that they are built on")
    asked = parser.parse_args()
    reason = why_not(AGGREGATOR_IMAGE, WORKER_IMAGE, asked.base)
    if reason is not None:
        print(f"skipped: {reason}")
        return 0
    base_bytes = image_bytes(asked.base)
    for image in (AGGREGATOR_IMAGE, WORKER_IMAGE, LITE_IMAGE):
        if podman("image", "exists", image, check=False) is not None:
            print(f"{image}: {size(image_bytes(image) - base_bytes)} on top of the base's {size(base_bytes)}")
    with Network(NAME) as network, tempfile.TemporaryDirectory() as folder:
        link = network.attach("aggregator")
        network.enter()
        measured = []
        for number in range(asked.starts):
            container = Container(
                NAME, AGGREGATOR_IMAGE, AGGREGATOR, link.podman_network, ["aggregator"],
                {f"{NAME}-{number}": "/var/lib/fedgrpc"}, Path(folder) / "log",
            )  # fmt: skip
            container.remove()
            try:
                measured.append(cold_start(container, f"{link.address}:50051"))
            finally:
                container.remove()
                podman("volume", "rm", "--force", f"{NAME}-{number}", check=False)
    for what, times_s in (("podman run", [m[0] for m in measured]), ("its process", [m[1] for m in measured])):
        low, high = min(times_s), max(times_s)
        print(f"from {what} to SERVING: median {statistics.median(times_s):.2f} s, {low:.2f} to {high:.2f} s")
    print(f"memory of the aggregator then: {size(max(m[2] for m in measured))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
