"""Certificates for the tests of TLS, made by openssl."""

import shutil
import subprocess

import pytest

_NEW = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def make_authority(folder):
    """A self-signed CA: ca.pem and ca.key."""
    folder.mkdir(exist_ok=True)
    _openssl(folder, "req", "-x509", *_NEW, "-days", "2", "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.pem")


def make_certificate(folder, name, role=None):
    """NAME.pem and NAME.key: a certificate for 127.0.0.1, of the folder's CA; with a role also a caller's."""
    _openssl(folder, "req", *_NEW, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
    uri = "" if role is None else f",URI:spiffe://example/fedgrpc/{role}/{name}"
    (folder / "san").write_text(f"subjectAltName=IP:127.0.0.1{uri}")
    sign = ["x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"]
    _openssl(folder, *sign, "-days", "2", "-extfile", "san", "-out", f"{name}.pem")


def tls_flags(folder, name, prefix="--tls", authority="ca.pem"):
    """The flags of one end of mutual TLS: what it shows, and whom it trusts."""
    shown = [f"{prefix}-cert", folder / f"{name}.pem", f"{prefix}-key", folder / f"{name}.key"]
    return [*shown, f"{prefix}-ca", folder / authority]


def _openssl(folder, *arguments):
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificates, is not installed")
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)
