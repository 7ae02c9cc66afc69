"""Where TLS does not fit or a proxy is in the way, the message names the cure."""

import asyncio
import shutil
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from fedgrpc.errors import LinkError
from fedgrpc.rpc.address import Address
from fedgrpc.rpc.channel import Tls, open_channel
from fedgrpc.rpc.diagnosis import explain, presented_chain, proxy_for
from fedgrpc.rpc.server import serve
from fedgrpc.rpc.status import domain_errors
from tests.support.certificates import make_authority, make_certificate
from tests.support.echo_service import call, echo_service


async def told(served, dialling, host="127.0.0.1", flags="--tls"):
    """What is told of a server with one TLS to a client with another."""
    async with serve("0.0.0.0:0", [echo_service()], tls=served) as server:
        return await asyncio.to_thread(explain, Address(host, server.port), dialling, flags)


def server_tls(pki, asks=False):
    return Tls(pki / "ca.pem" if asks else None, pki / "server.pem", pki / "server.key")


async def test_a_plain_client_of_a_server_with_tls_is_told_the_flag(pki):
    assert "--tls-ca" in await told(server_tls(pki), None)
    assert "--upstream-tls-ca" in await told(server_tls(pki), None, flags="--upstream-tls")


async def test_a_plain_client_of_a_server_that_asks_for_certificates_is_told_all_flags(pki):
    message = await told(server_tls(pki, asks=True), None)
    assert all(flag in message for flag in ("--tls-ca", "--tls-cert", "--tls-key"))


async def test_a_tls_client_of_a_plain_server_is_told_to_leave_it_out(pki):
    message = await told(None, Tls(pki / "ca.pem"))
    assert "no TLS" in message
    assert "leave out --tls" in message


async def test_a_client_without_a_certificate_is_told_that_one_is_asked_for(pki):
    message = await told(server_tls(pki, asks=True), Tls(pki / "ca.pem"))
    assert "--tls-cert" in message
    assert "--tls-key" in message


async def test_a_name_that_the_certificate_lacks_is_named_with_those_that_it_has(pki):
    message = await told(server_tls(pki), Tls(pki / "ca.pem"), host="127.0.0.2")
    assert "127.0.0.2" in message
    assert "127.0.0.1" in message


async def test_an_authority_that_did_not_sign_is_named(pki, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    make_authority(other)
    message = await told(server_tls(pki), Tls(other / "ca.pem"))
    assert str(other / "ca.pem") in message


async def test_there_is_nothing_to_say_of_what_fits_or_is_not_there(pki):
    assert await told(None, None) == ""
    assert await told(server_tls(pki), Tls(pki / "ca.pem")) == ""
    both = Tls(pki / "ca.pem", pki / "client.pem", pki / "client.key")
    assert await told(server_tls(pki, asks=True), both) == ""
    assert await asyncio.to_thread(explain, Address("127.0.0.1", 1), None) == ""


PROXY = ("http_proxy", "http://127.0.0.1:9")


@pytest.fixture
def proxied(monkeypatch):
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(*PROXY)
    return monkeypatch


def test_a_proxy_of_the_environment_is_named_with_its_variable(proxied):
    address = Address("192.0.2.1", 50051)
    assert proxy_for(address) == PROXY
    assert "http_proxy" in explain(address, None)
    assert "no_proxy" in explain(address, None)
    for excluded in ("192.0.2.1", "192.0.2.0/24", "a.example, 192.0.2.1"):
        proxied.setenv("no_proxy", excluded)
        assert proxy_for(address) is None


async def test_no_proxy_stands_between_two_ends_of_one_machine(proxied, tmp_path):
    for address in ("127.0.0.1:0", f"unix:{tmp_path}/s.sock"):
        async with serve(address, [echo_service()]) as server, open_channel(server.address) as channel:
            with domain_errors():
                await call(channel, "unary_unary", b"ok")


async def test_other_machines_are_dialled_through_the_proxy(proxied):
    async with open_channel("192.0.2.1:50051") as channel:
        with pytest.raises(LinkError, match=r"127\.0\.0\.1:9"), domain_errors():
            await call(channel, "unary_unary", b"ok")


async def test_a_certificate_that_is_not_yet_valid_is_said_to_be_so_by_this_machine_s_clock(pki):
    """As on a device that starts without a clock, of an aggregator with certificates of another authority."""
    authority = x509.load_pem_x509_certificate((pki / "ca.pem").read_bytes())
    key = serialization.load_pem_private_key((pki / "ca.key").read_bytes(), None)
    server = x509.load_pem_x509_certificate((pki / "server.pem").read_bytes())
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    builder = x509.CertificateBuilder().subject_name(server.subject).issuer_name(authority.subject)
    builder = builder.public_key(server.public_key()).serial_number(1).not_valid_before(tomorrow)
    builder = builder.not_valid_after(tomorrow + timedelta(days=1))
    names = x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))])
    builder = builder.add_extension(names, critical=False)
    later = builder.sign(key, hashes.SHA256())
    (pki / "server.pem").write_bytes(later.public_bytes(serialization.Encoding.PEM))
    message = await told(server_tls(pki), Tls(pki / "ca.pem"))
    assert "not yet valid" in message
    assert "this machine's clock" in message


async def test_files_that_change_are_served_to_the_next_connection_and_broken_ones_are_not(pki, tmp_path):
    def shown():
        return presented_chain(Address("127.0.0.1", server.port))[0]

    make_certificate(pki, "again")
    async with serve("127.0.0.1:0", [echo_service()], tls=server_tls(pki)) as server:
        before = await asyncio.to_thread(shown)
        (pki / "server.pem").write_text("half written")
        assert await asyncio.to_thread(shown) == before
        for kind in ("key", "pem"):
            shutil.copy(pki / f"again.{kind}", pki / f"server.{kind}")
        expected = x509.load_pem_x509_certificate((pki / "again.pem").read_bytes())
        assert await asyncio.to_thread(shown) == expected.public_bytes(serialization.Encoding.DER)
