"""The fault injector is itself tested: one that injects nothing would let every other test here pass."""

import asyncio
import time

import pytest

from tests.support.unreliable_link import UnreliableLink


async def echo(reader, writer):
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


@pytest.fixture
async def target():
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


async def dial(link):
    host, _, port = link.address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def said(streams, data=b"hello"):
    reader, writer = streams
    writer.write(data)
    return await asyncio.wait_for(reader.readexactly(len(data)), 120)


async def test_a_mended_link_changes_nothing_and_counts(target):
    async with UnreliableLink(target) as link:
        data = bytes(range(256)) * 4000
        streams = await dial(link)
        assert await said(streams, data) == data
        assert (link.up_bytes, link.down_bytes, link.dialled, link.connections) == (len(data), len(data), 1, 1)
        streams[1].close()


async def test_a_delay_is_one_way_and_holds_no_bytes_up(target):
    async with UnreliableLink(target, delay_s=0.1) as link:
        streams = await dial(link)
        begun = time.monotonic()
        for _ in range(3):
            await said(streams)
        assert time.monotonic() - begun >= 0.6
        streams[1].close()


async def test_a_rate_holds(target):
    async with UnreliableLink(target, bytes_per_s=200_000) as link:
        streams = await dial(link)
        begun = time.monotonic()
        assert len(await said(streams, bytes(100_000))) == 100_000
        assert time.monotonic() - begun >= 0.4
        streams[1].close()


async def test_a_cut_resets_who_is_there_and_who_dials_until_it_is_mended(target):
    async with UnreliableLink(target) as link:
        streams = await dial(link)
        await said(streams)
        link.cut()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await said(streams)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await said(await dial(link))
        assert link.refused == 1
        link.mend()
        streams = await dial(link)
        assert await said(streams) == b"hello"
        streams[1].close()


async def test_a_frozen_link_says_nothing_and_delivers_when_it_thaws(target):
    async with UnreliableLink(target) as link:
        streams = await dial(link)
        await said(streams)
        link.freeze()
        saying = asyncio.create_task(said(streams))
        await asyncio.sleep(0.3)
        assert not saying.done()
        link.thaw()
        assert await saying == b"hello"
        streams[1].close()


async def test_a_target_that_is_gone_is_a_reset():
    async with UnreliableLink("127.0.0.1:1") as link:
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await said(await dial(link))
