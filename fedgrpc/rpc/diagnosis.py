"""Diagnosis of a failed connection, where gRPC only says "socket closed": TLS that does not match, or a proxy.

The rule: look once, after a failure, for a few seconds at most, and send nothing but a TLS handshake.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from fedgrpc.errors import LinkError
from fedgrpc.rpc.address import Address
from fedgrpc.rpc.channel import Tls

_TIMEOUT_S: Final = 2.0
# How to join, by the prefix of a side's TLS flags.
_JOIN: Final = {
    "--tls": "--join TOKEN (operators: --data-dir or --context)",
    "--upstream-tls": "--upstream-join TOKEN",
}
# In the order in which gRPC reads them. It ignores upper-case ones.
_PROXIES: Final = ("grpc_proxy", "https_proxy", "http_proxy")
_NO_PROXIES: Final = ("no_grpc_proxy", "no_proxy")
_NOT_TLS: Final = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNEXPECTED_EOF", "HTTP_REQUEST")
# X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH of OpenSSL.
_OTHER_NAME: Final = (62, 64)
# X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED.
_OTHER_TIME: Final = (9, 10)


def presented_chain(address: Address) -> list[bytes]:
    """Return the certificates that a server shows, in DER, unchecked. Sends nothing but a handshake.

    Raises `LinkError` when nobody answers, or answers with anything but TLS.
    """
    context = _context(None)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with _connected(address) as connection, context.wrap_socket(connection) as secured:
            public: Any = getattr(secured, "get_unverified_chain", None)
            if public is not None:
                return list(public())
            # Python 3.13 has the method above. Before it is only below the surface, as objects.
            hidden: Any = secured._sslobj  # type: ignore[attr-defined]
            return [ssl.PEM_cert_to_DER_cert(each.public_bytes()) for each in hidden.get_unverified_chain()]
    except ssl.SSLError as error:
        raise LinkError(f"{address} does not speak TLS: is the aggregator --insecure? ({error.reason})") from error
    except OSError as error:
        raise LinkError(f"cannot reach {address}: {error.strerror or error}") from error


def is_refused(address: Address, tls: Tls) -> bool:
    """Return whether a server that `tls` trusts refuses its certificate. False where nobody answers."""
    try:
        with _connected(address) as connection:
            context = _context(tls)
            with context.wrap_socket(connection, server_hostname=tls.server_name or address.host) as secured:
                return _wants_certificate(secured)
    except ssl.SSLError as error:
        return "ALERT" in str(error).upper()
    except OSError:
        return False


def explain(address: Address, tls: Tls | None, flags: str = "--tls") -> str:
    """Return one line that says what is wrong and which flag helps. Empty: gRPC's own message says it all.

    `flags` is the prefix of the flags of this side's TLS. Blocks for a few seconds at most.
    """
    if address.is_unix:
        return ""
    if (proxy := proxy_for(address)) is not None:
        name, value = proxy
        return (
            f"it goes through the proxy {value} of the variable {name}; to go there directly, add it to no_proxy"
        )
    try:
        if tls is None:
            return _explain_plain(address, flags)
        return _explain_tls(address, tls, flags)
    except OSError:
        # No server listens or answers. gRPC's message says so.
        return ""


def proxy_for(address: Address) -> tuple[str, str] | None:
    """Return (variable, value) of the proxy that gRPC uses for an address. None: it connects directly."""
    if address.is_loopback:
        return None
    name = next((name for name in _PROXIES if os.environ.get(name)), None)
    if name is None or _excluded(address.host):
        return None
    return name, os.environ[name]


def _excluded(host: str) -> bool:
    text = next((os.environ[name] for name in _NO_PROXIES if os.environ.get(name)), "")
    for entry in filter(None, (entry.strip() for entry in text.split(","))):
        with suppress(ValueError):
            if ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False):
                return True
        if host.endswith(entry):
            return True
    return False


@contextmanager
def _connected(address: Address) -> Iterator[socket.socket]:
    with socket.create_connection((address.host, address.port), timeout=_TIMEOUT_S) as connection:
        yield connection


def _explain_plain(address: Address, flags: str) -> str:
    context = _context(None)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with _connected(address) as connection:
        try:
            with context.wrap_socket(connection) as secured:
                wants_certificate = _wants_certificate(secured)
        except ssl.SSLError as error:
            if any(reason in str(error).upper() for reason in _NOT_TLS) or "ALERT" not in str(error).upper():
                return ""
            wants_certificate = True
    also = f", with {flags}-cert and {flags}-key" if wants_certificate else ""
    return f"{address} speaks TLS; join it with {_JOIN[flags]}, or give {flags}-ca FILE{also}"


def _explain_tls(address: Address, tls: Tls, flags: str) -> str:
    context = _context(tls)
    with _connected(address) as connection:
        try:
            with context.wrap_socket(connection, server_hostname=tls.server_name or address.host) as secured:
                refused = _wants_certificate(secured)
        except ssl.SSLCertVerificationError as error:
            if error.verify_code in _OTHER_NAME:
                return _explain_name(address, tls)
            if error.verify_code in _OTHER_TIME:
                return f"the {error.verify_message} at {address}, by this machine's clock"
            if tls.server_name:
                return (
                    f"{address} is not the aggregator that was joined, or its authority was replaced; join again "
                    f"with a new token ({error.verify_message})"
                )
            trusted = f"{tls.ca} of {flags}-ca" if tls.ca else "what the system trusts"
            return f"the certificate of {address} does not go with {trusted}: {error.verify_message}"
        except ssl.SSLError as error:
            if any(reason in str(error).upper().replace(" ", "_") for reason in _NOT_TLS):
                if tls.server_name:
                    return f"{address} speaks no TLS, but this side has joined it: is the aggregator --insecure?"
                return f"{address} speaks no TLS; leave out {flags} and {flags}-..., or start it with --tls-cert"
            refused = "ALERT" in str(error).upper()
    if not refused:
        return ""
    if tls.server_name:
        return f"{address} refuses the certificate: it is too old, or of another authority; join with a new token"
    if tls.certificate is None:
        return f"{address} asks for a certificate; give {flags}-cert and {flags}-key"
    return f"{address} refuses the certificate {tls.certificate} of {flags}-cert"


def _explain_name(address: Address, tls: Tls) -> str:
    context = _context(tls)
    context.check_hostname = False
    with _connected(address) as connection, context.wrap_socket(connection) as secured:
        found: Any = secured.getpeercert() or {}
    names = [value for kind, value in found.get("subjectAltName", ()) if kind in ("DNS", "IP Address")]
    listed = ", ".join(names) or "no host"
    return f"the certificate of {address} is for {listed}, and not for {address.host}; dial one of its names"


def _wants_certificate(secured: ssl.SSLSocket) -> bool:
    """Return whether the server closes the connection for want of a certificate. Otherwise it speaks first."""
    try:
        return not secured.recv(1)
    except TimeoutError:
        return False
    except OSError:
        return True


def _context(tls: Tls | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=None if tls is None or tls.ca is None else str(tls.ca))
    # Python 3.13 is stricter than gRPC, which takes certificates without an Authority Key Identifier, too.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if tls is not None and tls.certificate is not None:
        context.load_cert_chain(tls.certificate, tls.key, password="")
    # gRPC's servers refuse connections without it.
    context.set_alpn_protocols(["h2"])
    return context
