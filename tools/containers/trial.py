"""Whether containers work on this machine as the fleet and the pods need them: tried with real ones.

`python -m tools.containers.trial IMAGE`, any with Python: a container with limits and a read-only root answers
over a link from a namespace of its own, and so does a pod. Exit code 0; or 1, and in one line why not.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Final

from tools.containers.network import Link, Network, NetworkError
from tools.containers.podman import Container, Limits, PodmanError, podman, why_not

NAME: Final = "fgtrial"
PORT: Final = 50051
_PATIENCE_S: Final = 60.0
_SERVER: Final = ["python3", "-m", "http.server", str(PORT), "--directory", "/tmp"]


def try_container(image: str, link: Link, folder: Path) -> None:
    """As the fleet has its devices. Raises `PodmanError` and what `answers` raises."""
    limits = Limits(64 << 20, 0.5)
    container = Container(NAME, image, limits, link.podman_network, _SERVER, {NAME: "/data"}, folder / "log")
    container.remove()
    try:
        container.start()
        answers(link)
        container.kill()
    finally:
        container.remove()
        podman("volume", "rm", "--force", NAME, check=False)


def try_pod(image: str, link: Link, folder: Path) -> None:
    """As the tests of the manifests have theirs. Raises `PodmanError` and what `answers` raises."""
    security = {"readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    container = {"name": "c", "image": image, "command": _SERVER, "securityContext": security}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": NAME}, "spec": {"containers": [container]}}
    path = folder / "pod.json"
    path.write_text(json.dumps(pod))
    podman("pod", "rm", "--force", "--ignore", NAME, check=False)
    there = ["nsenter", f"--net=/run/netns/{link.namespace}", "podman", "play", "kube", "--network", "host"]
    try:
        done = subprocess.run([*there, str(path)], capture_output=True, text=True, timeout=180)
        if done.returncode != 0:
            raise PodmanError(f"podman play kube: {done.stderr.strip()}")
        answers(link)
    finally:
        podman("pod", "rm", "--force", "--ignore", "--time", "0", NAME, check=False)


def answers(link: Link) -> None:
    """Hear from the container at the other end of the link. Raises `NetworkError`."""
    until_s = time.monotonic() + _PATIENCE_S
    while True:
        try:
            with urllib.request.urlopen(f"http://{link.address}:{PORT}/", timeout=5):
                return
        except OSError as error:
            if time.monotonic() > until_s:
                raise NetworkError(f"no answer over the link: {error}") from error
        time.sleep(0.2)


def main(image: str) -> int:
    """The exit code."""
    reason = why_not(image)
    try:
        if reason is None:
            with Network(NAME) as network, tempfile.TemporaryDirectory() as folder:
                first, second = network.attach("container", 10_000_000), network.attach("pod")
                network.enter()
                try_container(image, first, Path(folder))
                try_pod(image, second, Path(folder))
    except (NetworkError, PodmanError, OSError, subprocess.TimeoutExpired) as error:
        reason = " ".join(str(error).split())[:300]
    if reason is not None:
        print(reason)
    return 0 if reason is None else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
