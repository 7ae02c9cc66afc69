"""Channels and their options: keepalive, message bounds, TLS. The numbers of both sides are here, side by side."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio

from fedgrpc.errors import UsageError
from fedgrpc.process import keep_from_children
from fedgrpc.rpc.address import Address, dialled

if TYPE_CHECKING:
    from fedgrpc.rpc.server_tls import TlsMaterial

Options = list[tuple[str, int | str]]


# The default bound of gRPC clients in every language. A manifest of 10,000 tensors is below 1 MiB.
MAX_MESSAGE_BYTES: Final = 4 << 20
# A chunk's data travels with its offset, CRC and three tags. The rest is room for future fields.
MAX_CHUNK_BYTES: Final = MAX_MESSAGE_BYTES - (64 << 10)

# The shortest idle timeouts on the way are about 60 s (ingresses, some carrier NATs), so an idle connection sends
# a ping every 30 s. A ping may wait behind data in the send buffers of a slow link, hence the long timeout: a
# dead link is noticed within a minute, and a slow link is not taken for dead.
_PING_INTERVAL_MS: Final = 30_000
_PING_TIMEOUT_MS: Final = 30_000
# The server pings too, to notice devices that vanished.
_SERVER_PING_INTERVAL_MS: Final = 60_000
# gRPC's defaults would answer pings that are closer than 5 minutes with GOAWAY "too many pings". The bound is
# a third of the client's interval, so jitter cannot cross it. Strikes are off: a ping costs nothing, and a lost
# connection costs a retry.
_MIN_PING_INTERVAL_MS: Final = _PING_INTERVAL_MS // 3

# Bytes that a server holds of each idle connection, and of each stream that it does not read yet.
_READ_BUFFER_BYTES: Final = 8 << 10
_UNREAD_BYTES: Final = 16 << 10

# Calls that one connection may have open at a time.
MAX_STREAMS: Final = 100

_COMMON: Final[Options] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # No compression of messages: a few bytes of gzip inflate to a whole message before anyone has seen them.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_MS),
    ("grpc.http2.max_pings_without_data", 0),
]

CLIENT_OPTIONS: Final[Options] = [
    *_COMMON,
    ("grpc.keepalive_time_ms", _PING_INTERVAL_MS),
    # fedgrpc.rpc.retry retries instead: gRPC would buffer streams and hide failures.
    ("grpc.enable_retries", 0),
    ("grpc.service_config_disable_resolution", 1),
    # Each channel has its own connection: the broken link of one worker affects no other in the same process.
    ("grpc.use_local_subchannel_pool", 1),
    # After a long outage the default would wait up to two minutes before dialling again.
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 10_000),
]

SERVER_OPTIONS: Final[Options] = [
    *_COMMON,
    ("grpc.keepalive_time_ms", _SERVER_PING_INTERVAL_MS),
    ("grpc.http2.min_ping_interval_without_data_ms", _MIN_PING_INTERVAL_MS),
    ("grpc.http2.max_ping_strikes", 0),
    # Without this a second server on the same port starts without an error and takes half of the calls.
    ("grpc.so_reuseport", 0),
    # A connection's read buffer grows to the most that ever came at once, and stays so large: a worker that has
    # pushed one update of 0.24 MB would cost 0.15 MB while it is connected.
    ("grpc.experimental.tcp_max_read_buffer_size", _READ_BUFFER_BYTES),
    # Fast links would let a sender run far ahead of its reader: with 1,000 uploads that is all of their bytes.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", _UNREAD_BYTES),
    # Without a bound one connection opens and resets 80,000 streams a second (CVE-2023-44487).
    ("grpc.max_concurrent_streams", MAX_STREAMS),
]


# With TLS a connection ends after about an hour, and calls on it after two: a caller whose certificate counts no
# more does not stay. A transfer that is cut goes on where it was.
TLS_SERVER_OPTIONS: Final[Options] = [
    ("grpc.max_connection_age_ms", 3_600_000),
    ("grpc.max_connection_age_grace_ms", 3_600_000),
]


@dataclass(frozen=True)
class Tls:
    """TLS files in PEM, for either side.

    A server needs `certificate` and `key`. With `ca` it asks clients for certificates signed by it (mTLS). Files
    that change are read again for the next connection.

    A client needs `ca` unless the system trusts the server's certificate. With `certificate` and `key` it shows
    its own. With `server_name` it expects that name in the server's certificate, and not the host's that it dials.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    server_name: str = ""

    def material(self) -> TlsMaterial:
        """Read the files of a server (`fedgrpc.rpc.server_tls.ServerTls`).

        Raises:
            UsageError: a file is missing, unreadable or no PEM of the right kind.
            OSError: it has gone meanwhile.
        """
        if self.certificate is None or self.key is None:
            raise UsageError("TLS needs a server certificate and its key")
        # Not above: a container's health check, which only dials, is to load nothing more.
        from fedgrpc.rpc.server_tls import TlsMaterial

        self._check()
        pair = (self.key.read_bytes(), self.certificate.read_bytes())
        return TlsMaterial((pair,), _read(self.ca), asks=self.ca is not None)

    def revision(self) -> tuple[object, ...]:
        """Return what differs once a file has changed. Raises OSError."""
        paths = (path for path in (self.ca, self.certificate, self.key) if path is not None)
        return tuple((found.st_ino, found.st_mtime_ns, found.st_size) for found in (path.stat() for path in paths))

    def client_credentials(self) -> Any:
        """Return the credentials to dial with.

        Raises:
            UsageError: a file is missing, unreadable or no PEM of the right kind.
        """
        self._check()
        return grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.certificate))

    def _check(self) -> None:
        """Raise `UsageError` for a bad file. gRPC reports it only in its log, when the first handshake fails."""
        if (self.certificate is None) != (self.key is None):
            raise UsageError("a TLS certificate and its key go together; only one was given")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key, password="")
            if self.ca is not None:
                context.load_verify_locations(self.ca)
        except (OSError, ValueError) as error:
            names = ", ".join(str(path) for path in (self.ca, self.certificate, self.key) if path)
            raise UsageError(f"cannot use the TLS files {names}: {error}") from error


def _read(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()


def open_channel(target: str, tls: Tls | None = None) -> grpc.aio.Channel:
    """Return a channel to `target` (`fedgrpc.rpc.address`), which dials lazily and reconnects by itself.

    Raises:
        UsageError: the target or a TLS file is unusable.
    """
    address = dialled(target)
    options = client_options(address, tls)
    keep_from_children(address.path or address.port)
    if tls is None:
        return grpc.aio.insecure_channel(address.target, options=options)
    return grpc.aio.secure_channel(address.target, tls.client_credentials(), options=options)


def client_options(address: Address, tls: Tls | None = None) -> Options:
    """Return the options of a channel to `address`. Within one machine it ignores the environment's proxy."""
    options = [*CLIENT_OPTIONS]
    if address.is_loopback:
        options.append(("grpc.enable_http_proxy", 0))
    if tls is not None and tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options
