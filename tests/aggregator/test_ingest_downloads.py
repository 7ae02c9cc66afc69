"""Downloads of an ingest process: the bytes of the payload that is asked for, and of no former one in its file."""

import asyncio
import os

from fedgrpc.aggregator.chunk_cache import PayloadFile
from fedgrpc.aggregator.ingest_downloads import IngestDownloads, download_order
from fedgrpc.rpc.framing import parse

SIZE = 100_000


class Puller:
    """A caller that takes each message at once, or none after the first."""

    def __init__(self, stalls=False):
        self.data = b""
        self.begun = asyncio.Event()
        self._stalls = stalls

    async def write(self, message):
        self.data += bytes(parse(message).data)
        self.begun.set()
        if self._stalls:
            await asyncio.Event().wait()


async def pulled(downloads, payload):
    puller = Puller()
    await downloads.send(download_order(payload, 0, 1 << 20), puller)
    return puller.data


async def test_a_version_in_the_overwritten_file_of_a_former_one_is_sent_as_it_is(tmp_path):
    """While somebody pulls, chunks of former payloads stay in memory."""
    downloads, path, other = IngestDownloads(1 << 24, 1 << 24), tmp_path / "model", tmp_path / "other"
    path.write_bytes(former := os.urandom(SIZE))
    other.write_bytes(os.urandom(SIZE))
    with other.open("rb", buffering=0) as file:
        slow = Puller(stalls=True)
        pulling = asyncio.create_task(downloads.send(download_order(PayloadFile(file, 0, SIZE), 0, 1 << 20), slow))
        await slow.begun.wait()
        with path.open("rb", buffering=0) as first:
            assert await pulled(downloads, PayloadFile(first, 0, SIZE)) == former
        with path.open("r+b") as again:
            again.write(later := os.urandom(SIZE))
        with path.open("rb", buffering=0) as second:
            assert await pulled(downloads, PayloadFile(second, 0, SIZE)) == later
        pulling.cancel()
        await asyncio.gather(pulling, return_exceptions=True)
