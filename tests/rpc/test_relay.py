import asyncio

from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.rpc.relay import Kind, Link, fields_of, joined
from fedgrpc.rpc.relayed_calls import CallDetails
from fedgrpc.rpc.server_tls import TlsMaterial

FRAMES = st.lists(
    st.tuples(st.sampled_from(Kind), st.integers(0, (1 << 32) - 1), st.binary(max_size=200)), max_size=8
)


class Wire:
    """A transport that keeps what is written."""

    def __init__(self):
        self.data = b""

    def write(self, data):
        self.data += data


@given(FRAMES, st.lists(st.integers(1, 40), min_size=1))
def test_frames_arrive_as_they_were_sent_however_the_bytes_are_cut(frames, cuts):
    async def sent():
        link, wire = Link(lambda *frame: None, lambda: None), Wire()
        link._transport = wire
        for frame in frames:
            link.send(*frame)
        await asyncio.sleep(0)
        return wire.data

    data, came, at = asyncio.run(sent()), [], 0
    receiver = Link(lambda *frame: came.append(frame), lambda: None)
    while at < len(data):
        size = cuts[len(came) % len(cuts)]
        receiver.data_received(data[at : at + size])
        at += size
    assert came == frames


@given(st.lists(st.binary(max_size=50)))
def test_fields_come_back(fields):
    assert fields_of(joined(fields)) == fields


@given(st.text(max_size=20), st.booleans(), st.binary(max_size=50), st.text(max_size=20), st.binary(max_size=20))
def test_details_of_a_call_come_back(peer, over_tls, certificate, text, data):
    details = CallDetails(
        "/a/B", peer, over_tls, certificate, (("key", text), ("some-bin", data), ("key", "again"))
    )
    assert CallDetails.decoded(details.encoded()) == details


def test_tls_material_comes_back():
    for material in (
        TlsMaterial(((b"key", b"chain"), (b"k2", b"c2")), b"anchors", True),
        TlsMaterial((), None, False),
    ):
        assert TlsMaterial.decoded(material.encoded()) == material
