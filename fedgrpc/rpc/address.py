"""Addresses to listen on or to dial: HOST:PORT, [IPV6]:PORT, unix:PATH, and gRPC's URIs of these.

The rule: an address that cannot work is refused at once, with what to write instead. gRPC would retry without end.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedgrpc.errors import UsageError

# Socket of an aggregator for operators on its host: file permissions decide who calls.
SOCKET: Final = "operator.sock"
# <sys/un.h> has 108 bytes for a path, and 104 on some systems.
_LONGEST_BYTES: Final = 100
_EXAMPLE: Final = "HOST:PORT, as in 192.168.1.10:50051"
_URI: Final = re.compile(r"(dns|ipv4|ipv6):(?://[^/]*/)?(.+:.+)", re.DOTALL)
_LABEL: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_MAX_HOST_CHARS: Final = 253
_MAX_PORT: Final = 65535
# gRPC takes such a host for the scheme of a URI.
_SCHEMES: Final = frozenset({"dns", "ipv4", "ipv6", "unix", "unix-abstract", "vsock", "xds", "google-c2p"})


@dataclass(frozen=True)
class Address:
    """A host and a port, or the path of a unix socket."""

    host: str
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Return the address of a text. Raises `UsageError`, with what to write instead."""
        written = text.strip()
        if written.startswith("unix:"):
            return cls._unix(written)
        if "://" in written and not written.startswith("dns://"):
            raise UsageError(f"{text!r} must look like {_EXAMPLE}, without {written.partition('//')[0]}//")
        uri = _URI.fullmatch(written)
        host, colon, port = (uri.group(2) if uri else written).rpartition(":")
        if not colon or not host or "/" in host:
            raise UsageError(f"{text!r} must look like {_EXAMPLE}")
        checked_port = _checked_port(port, text)
        return cls(_checked_host(host, checked_port, text), checked_port)

    @classmethod
    def _unix(cls, written: str) -> Address:
        path = written.removeprefix("unix:")
        path = path.removeprefix("//") if path.startswith("///") else path
        if not path or path.endswith("/") or "\0" in path:
            raise UsageError(f"{written!r} has no path; it must look like unix:/run/fedgrpc.sock, or {_EXAMPLE}")
        return cls("", path=path)

    @property
    def is_unix(self) -> bool:
        """True if the address is a socket in the file system."""
        return bool(self.path)

    @property
    def is_loopback(self) -> bool:
        """True if traffic to the address stays on this machine, as far as the text tells: no name is looked up."""
        if self.is_unix or self.host == "localhost" or self.host.endswith(".localhost"):
            return True
        address = _ip(self.host)
        # Dialling 0.0.0.0 or :: reaches this machine.
        return address is not None and (address.is_loopback or address.is_unspecified)

    @property
    def is_local(self) -> bool:
        """True if only this machine reaches a server that listens there."""
        if self.is_unix or self.host == "localhost":
            return True
        address = _ip(self.host)
        return address is not None and address.is_loopback

    @property
    def is_unspecified(self) -> bool:
        """True if a server that listens there does so on every address of its machine."""
        address = _ip(self.host)
        return address is not None and address.is_unspecified

    @property
    def target(self) -> str:
        """The address as gRPC understands it."""
        if self.is_unix or self.host.lower() not in _SCHEMES:
            return str(self)
        return f"dns:///{self}"

    def with_port(self, port: int) -> Address:
        """Return the same host with another port."""
        return Address(self.host, port)

    def resolve(self, listening: bool = False) -> list[tuple[int, tuple[object, ...]]]:
        """Return (family, socket address) of each of the host's IP addresses. Raises OSError."""
        flags = socket.AI_PASSIVE if listening else 0
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=flags)
        return [(family, tuple(where)) for family, _, _, _, where in found]

    def __str__(self) -> str:
        if self.is_unix:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def dialled(text: str) -> Address:
    """Return the address of a text to dial. Raises `UsageError`."""
    address = Address.parse(text)
    if not address.is_unix and address.port == 0:
        raise UsageError(f"nobody listens on port 0 of {text!r}; give the port that the server's log names")
    return address


def _checked_port(port: str, text: str) -> int:
    if not (port.isascii() and port.isdigit() and len(port) <= len(str(_MAX_PORT)) and int(port) <= _MAX_PORT):
        raise UsageError(f"{text!r} must look like {_EXAMPLE}: {port!r} is no port from 0 to {_MAX_PORT}")
    return int(port)


def _checked_host(host: str, port: int, text: str) -> str:
    """Return the host for resolvers: no brackets, names in ASCII (IDNA), a zone after one '%'."""
    if host.startswith("[") and host.endswith("]"):
        inner = host[1:-1].replace("%25", "%")
        if _ip(inner) is None:
            raise UsageError(f"{text!r} has no IPv6 address in its brackets; it must look like {_EXAMPLE}")
        return inner
    if ":" in host:
        # All of ::1:50051 may be the address.
        raise UsageError(f"{text!r}: IPv6 addresses go in brackets, as in [{host}]:{port}; else {_EXAMPLE}")
    if _ip(host) is not None:
        return host
    try:
        ascii_host = host if host.isascii() else host.encode("idna").decode()
    except UnicodeError:
        ascii_host = ""
    labels = ascii_host.removesuffix(".").split(".")
    if len(ascii_host) > _MAX_HOST_CHARS or not all(_LABEL.fullmatch(label) for label in labels):
        raise UsageError(f"{text!r} must look like {_EXAMPLE}: {host!r} is no name of a host")
    return ascii_host


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


@contextmanager
def local_address(folder: Path) -> Iterator[str]:
    """Yield the address of the socket in `folder`, to listen on or to dial while the block runs.

    The path of a deep folder is too long for a socket, and then goes through a descriptor of the folder.
    Raises `UsageError` when there is no such folder.
    """
    path = folder.absolute() / SOCKET
    if len(os.fsencode(path)) <= _LONGEST_BYTES:
        yield f"unix:{path}"
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"cannot use the folder {folder}: {error.strerror}") from error
    try:
        yield f"unix:/proc/self/fd/{descriptor}/{SOCKET}"
    finally:
        os.close(descriptor)
