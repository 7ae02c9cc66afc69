"""Addresses as people write them: read, or refused with what to write instead."""

import pytest

from fedgrpc.errors import UsageError
from fedgrpc.rpc.address import Address, dialled


@pytest.mark.parametrize(
    ("text", "host", "port", "target"),
    [
        ("192.168.1.10:50051", "192.168.1.10", 50051, "192.168.1.10:50051"),
        (" 127.0.0.1:1\n", "127.0.0.1", 1, "127.0.0.1:1"),
        ("fl_server.local:7", "fl_server.local", 7, "fl_server.local:7"),
        ("localhost.:7", "localhost.", 7, "localhost.:7"),
        ("[::1]:50051", "::1", 50051, "[::1]:50051"),
        ("[fe80::1%eth0]:50051", "fe80::1%eth0", 50051, "[fe80::1%eth0]:50051"),
        ("[fe80::1%25eth0]:50051", "fe80::1%eth0", 50051, "[fe80::1%eth0]:50051"),
        ("küche:50051", "xn--kche-0ra", 50051, "xn--kche-0ra:50051"),
        ("dns:50051", "dns", 50051, "dns:///dns:50051"),
        ("unix:50051x", "", 0, "unix:50051x"),
        ("dns:///aggregator:50051", "aggregator", 50051, "aggregator:50051"),
        ("dns:aggregator:50051", "aggregator", 50051, "aggregator:50051"),
        ("ipv4:127.0.0.1:50051", "127.0.0.1", 50051, "127.0.0.1:50051"),
        ("ipv6:[::1]:50051", "::1", 50051, "[::1]:50051"),
        ("unix:/run/a b.sock", "", 0, "unix:/run/a b.sock"),
        ("unix:///run/a.sock", "", 0, "unix:/run/a.sock"),
    ],
)
def test_an_address_is_read_and_given_to_grpc_without_doubt(text, host, port, target):
    address = Address.parse(text)
    assert (address.host, address.port, address.target) == (host, port, target)
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    ("text", "cure"),
    [
        ("::1:50051", "[::1]:50051"),
        (":::50051", "[::]:50051"),
        ("fe80::1%eth0:50051", "brackets"),
        ("[aggregator]:50051", "brackets"),
        ("http://127.0.0.1:50051", "without http:"),
        ("127.0.0.1", "HOST:PORT"),
        ("127.0.0.1:http", "port"),
        ("127.0.0.1:-1", "port"),
        ("127.0.0.1:٣", "port"),
        ("127.0.0.1:99999", "port"),
        ("127.0.0.1:" + "9" * 5000, "port"),
        ("a b:50051", "HOST:PORT"),
        ("a\nb:50051", "HOST:PORT"),
        ("a" * 64 + ":50051", "HOST:PORT"),
        ("-a:50051", "HOST:PORT"),
        ("a/b:50051", "HOST:PORT"),
        ("unix:", "path"),
        ("unix:/run/", "path"),
        ("unix:/run/a\0b", "path"),
        ("", "HOST:PORT"),
    ],
)
def test_what_cannot_be_an_address_is_refused_with_the_cure(text, cure):
    with pytest.raises(UsageError) as caught:
        Address.parse(text)
    assert cure in str(caught.value)
    assert "HOST:PORT" in str(caught.value)


def test_port_0_is_for_servers():
    assert Address.parse("127.0.0.1:0").port == 0
    with pytest.raises(UsageError, match="port 0"):
        dialled("127.0.0.1:0")
    assert dialled("unix:a.sock").is_unix


@pytest.mark.parametrize(
    ("text", "loopback"),
    [
        *(
            ("127.0.0.1:1", True),
            ("127.1.2.3:1", True),
            ("[::1]:1", True),
            ("localhost:1", True),
            ("unix:a", True),
        ),
        *(("0.0.0.0:1", True), ("10.0.0.1:1", False), ("aggregator:1", False), ("[fd00::1]:1", False)),
    ],
)
def test_what_never_leaves_the_machine_is_known(text, loopback):
    assert Address.parse(text).is_loopback == loopback
