"""A newer stream of an upload takes over from a former one that is still opening the file."""

import asyncio
import threading

import grpc
import pytest

from fedgrpc.rpc.client_stream import ClientStream
from fedgrpc.storage.uploads import UploadJournal
from fedgrpc.v1 import aggregator_pb2 as pb
from tests.support.hand_driven_device import PATIENCE_S, chunks, encoded, update_of
from tests.support.running_federation import running_aggregator

ONE = {"min_workers": 1, "selection_window_s": 0.1}


async def test_one_stream_at_a_time_opens_the_file_of_an_update(tmp_path, monkeypatch):
    """Else the last one to open it puts another file in its place, while chunks go to the first."""
    entered, go_on, begin, count = threading.Event(), threading.Event(), UploadJournal.begin, 0

    def slowly(journal, header, manifest):
        nonlocal count
        count += 1
        if count == 1:
            entered.set()
            go_on.wait(PATIENCE_S)
        return begin(journal, header, manifest)

    async with running_aggregator(tmp_path, policy=ONE) as running:
        device = await running.device("a")
        task = await device.task()
        manifest, payload = encoded(update_of())
        header = pb.PushUpdateRequest(header=device.header(task, manifest))
        first = ClientStream(device.stub.PushUpdate(timeout=PATIENCE_S))
        await first.write(header)
        await first.write(chunks(payload)[0])
        await device.until_held(task, 2048)
        monkeypatch.setattr(UploadJournal, "begin", slowly)
        second = ClientStream(device.stub.PushUpdate(timeout=PATIENCE_S))
        await second.write(header)
        assert await asyncio.to_thread(entered.wait, PATIENCE_S)
        third = asyncio.create_task(device.push(task, offset=2048))
        await asyncio.sleep(0.3)
        assert count == 1
        go_on.set()
        assert (await third).complete
        for stalled in (first, second):
            with pytest.raises(grpc.aio.AioRpcError):
                await stalled.finish()
        await running.until_finished()
