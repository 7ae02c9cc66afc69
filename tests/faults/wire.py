"""A wire between this machine and a network namespace that loses, repeats, delays and reorders IP packets.

What the kernel's netem does, on any kernel that has TUN devices: each end of the wire is one, and what comes out
of the one goes into the other from this event loop. TCP runs over it and has to make good what the wire does.
"""

import asyncio
import fcntl
import os
import random
import struct
import subprocess
from collections import Counter

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_PACKET_BYTES = 1 << 16
_AT_ONCE = 64


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Wire:
    """A context manager within an event loop; `address` is this machine's end, `namespace` where the other one is.

    Each packet is lost, or sent twice, with these probabilities. It takes `delay_s` and up to `jitter_s` more: so
    packets overtake each other. `done` counts what has been done to packets. Raises OSError and
    CalledProcessError where the machine has no such devices.
    """

    def __init__(self, number, *, loss=0.0, twice=0.0, delay_s=0.0, jitter_s=0.0, seed=0):
        block = 4 * (number % 64)
        self.namespace = f"fedgrpc-w{number}"
        self.address, self._far_address = f"10.213.9.{block + 1}", f"10.213.9.{block + 2}"
        self._names = f"fgw{number}", f"fgx{number}"
        self._loss, self._twice, self._delay_s, self._jitter_s = loss, twice, delay_s, jitter_s
        self._rng = random.Random(seed)
        self._latest = Counter()
        self._ends = []
        self.under_way = 0
        self.done = Counter()

    def __enter__(self):
        try:
            near, far = self._names
            self._ends = [_device(near), _device(far)]
            ip("netns", "add", self.namespace)
            ip("link", "set", far, "netns", self.namespace)
            ip("address", "add", f"{self.address}/30", "dev", near)
            ip("link", "set", near, "up")
            ip("-n", self.namespace, "address", "add", f"{self._far_address}/30", "dev", far)
            ip("-n", self.namespace, "link", "set", "lo", "up")
            ip("-n", self.namespace, "link", "set", far, "up")
        except (OSError, subprocess.CalledProcessError):
            self._remove()
            raise
        loop = asyncio.get_running_loop()
        for end, other in (self._ends, self._ends[::-1]):
            loop.add_reader(end, self._carry, end, other)
        return self

    def __exit__(self, *_):
        for end in self._ends:
            asyncio.get_running_loop().remove_reader(end)
        self._remove()

    def _remove(self):
        ends, self._ends = self._ends, []
        for end in ends:
            os.close(end)
        subprocess.run(["ip", "netns", "del", self.namespace], capture_output=True)

    def _carry(self, end, other):
        for _ in range(_AT_ONCE):
            try:
                packet = os.read(end, _PACKET_BYTES)
            except BlockingIOError:
                return
            self.done["carried"] += 1
            if self._rng.random() < self._loss:
                self.done["lost"] += 1
                continue
            copies = 1
            if self._rng.random() < self._twice:
                self.done["twice"] += 1
                copies = 2
            for _ in range(copies):
                self._send_later(other, packet)

    def _send_later(self, other, packet):
        loop = asyncio.get_running_loop()
        due = loop.time() + self._delay_s + self._rng.random() * self._jitter_s
        if due < self._latest[other]:
            self.done["overtaken"] += 1
        self._latest[other] = max(self._latest[other], due)
        self.under_way += 1
        loop.call_at(due, self._send, other, packet)

    def _send(self, other, packet):
        self.under_way -= 1
        if other not in self._ends:
            return
        try:
            os.write(other, packet)
        except OSError:
            # The device is full or down: one more packet that is lost.
            self.done["lost"] += 1


def _device(name):
    """A TUN device of that name; it is gone when its descriptor is closed."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
