"""Peers of calls: which of them are on this machine."""

from types import SimpleNamespace

import pytest

from fedgrpc.rpc.identity import is_on_this_machine


@pytest.mark.parametrize(
    ("peer", "local"),
    [
        ("unix:/run/fedgrpc.sock", True),
        ("unix:", True),
        ("ipv4:127.0.0.1:5000", True),
        ("ipv6:%5B::1%5D:5000", True),
        ("ipv4:192.0.2.7:5000", False),
        ("ipv6:%5Bfd00::2%5D:5000", False),
        ("ipv6:%5B::ffff:192.0.2.7%5D:5000", False),
        ("unknown", False),
    ],
)
def test_only_unix_sockets_and_loopback_are_this_machine(peer, local):
    assert is_on_this_machine(SimpleNamespace(peer=lambda: peer)) is local
