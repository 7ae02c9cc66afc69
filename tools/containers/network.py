"""A network of this machine's own: a bridge in a namespace, and a namespace with a shaped link for each container.

The rule: nothing of it touches the machine's own interfaces, and all of it is gone when the block ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_CLONE_NEWNET: Final = 0x40000000
_SUBNET: Final = "10.77.0"
_NAMESPACES: Final = Path("/run/netns")


class NetworkError(Exception):
    """The kernel or its tools will not do it; the message is theirs."""


@dataclass(frozen=True)
class Link:
    """One container's end. `shaped`: the kernel holds it to its rate, both ways."""

    namespace: str
    address: str
    port: str
    shaped: bool

    @property
    def podman_network(self) -> str:
        """As `podman run --network` takes it."""
        return f"ns:{_NAMESPACES / self.namespace}"


class Network:
    """`with`: links are made in the block, and have gone after it. Its namespaces begin with `name`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._hub = f"{name}-hub"
        self._links: list[Link] = []

    def __enter__(self) -> Network:
        self._forget()
        _run("ip", "netns", "add", self._hub)
        for words in ("link set lo up", "link add br0 type bridge", "link set br0 up"):
            _run("ip", "-n", self._hub, *words.split())
        _run("ip", "-n", self._hub, "addr", "add", f"{_SUBNET}.1/24", "dev", "br0")
        return self

    def __exit__(self, *_: object) -> None:
        self._forget()

    def _forget(self) -> None:
        """Also what a former process of this name has left; the links go with their namespaces."""
        for path in sorted(_NAMESPACES.glob(f"{self._name}-*")) if _NAMESPACES.exists() else ():
            _run("ip", "netns", "del", path.name)

    def attach(self, name: str, bits_per_second: int | None = None) -> Link:
        """A namespace for the container `name`, linked to all others, at this rate each way.

        Raises:
            NetworkError: the kernel has no namespaces, bridges or veth pairs.
        """
        number = len(self._links) + 2
        namespace, port = f"{self._name}-{name}", f"v{number}"
        _run("ip", "netns", "add", namespace)
        _run("ip", "-n", self._hub, *f"link add {port} type veth peer name eth0 netns {namespace}".split())
        _run("ip", "-n", self._hub, *f"link set {port} master br0 up".split())
        for words in ("link set lo up", "link set eth0 up", f"addr add {_SUBNET}.{number}/24 dev eth0"):
            _run("ip", "-n", namespace, *words.split())
        shaped = bits_per_second is not None and _shape(bits_per_second, (namespace, "eth0"), (self._hub, port))
        link = Link(namespace, f"{_SUBNET}.{number}", port, shaped)
        self._links.append(link)
        return link

    def set_up(self, link: Link, up: bool) -> None:
        """Pull the cable, or put it back."""
        _run("ip", "-n", self._hub, "link", "set", link.port, "up" if up else "down")

    def carried_bytes(self, link: Link) -> tuple[int, int]:
        """What the link has carried to the container and from it."""
        text = _run("ip", "netns", "exec", self._hub, "cat", "/proc/net/dev")
        (line,) = [line for line in text.splitlines() if line.strip().startswith(f"{link.port}:")]
        counts = line.partition(":")[2].split()
        return int(counts[8]), int(counts[0])

    def enter(self) -> None:
        """Move this process into the hub, so that it can dial the containers; before it has threads."""
        with (_NAMESPACES / self._hub).open() as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET) != 0:
                raise NetworkError(f"setns: {os.strerror(ctypes.get_errno())}")


def _shape(bits_per_second: int, *ends: tuple[str, str]) -> bool:
    """Hold both directions to a rate by a token bucket; False where the kernel has none."""
    burst_bytes = max(16_384, bits_per_second // 8 // 100)
    rule = f"root tbf rate {bits_per_second}bit burst {burst_bytes}b latency 400ms".split()
    try:
        for namespace, device in ends:
            _run("tc", "-n", namespace, "qdisc", "add", "dev", device, *rule)
    except NetworkError:
        for namespace, device in ends:
            with contextlib.suppress(NetworkError):
                _run("tc", "-n", namespace, "qdisc", "del", "dev", device, "root")
        return False
    return True


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        raise NetworkError(f"there is no {command[0]}; Debian has it in iproute2") from None
    if done.returncode != 0:
        raise NetworkError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
