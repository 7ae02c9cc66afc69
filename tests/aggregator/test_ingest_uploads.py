"""Uploads of an ingest process: no file of theirs is open once they have ended."""

import asyncio
import threading

import pytest

from fedgrpc.aggregator.ingest_uploads import IngestUploads, UploadOrder
from fedgrpc.v1.aggregator_pb2 import UpdateHeader
from tests.support.hand_driven_device import PATIENCE_S, encoded, update_of


async def test_an_upload_that_is_stopped_while_its_file_is_opened_ends_once_that_is_closed(tmp_path, monkeypatch):
    """Until then no other process may open it."""
    uploads, opened = IngestUploads(1 << 20, 1 << 20), []
    entered, go_on, begun = threading.Event(), threading.Event(), uploads._begun

    def slowly(*about):
        entered.set()
        go_on.wait(PATIENCE_S)
        opened.append(begun(*about))
        return opened[0]

    monkeypatch.setattr(uploads, "_begun", slowly)
    header = UpdateHeader(token="token", manifest=encoded(update_of())[0])
    order = UploadOrder(tmp_path, False, 10.0, 1 << 20, None).encoded(header)
    taking = asyncio.create_task(uploads.take(order, None))
    assert await asyncio.to_thread(entered.wait, PATIENCE_S)
    taking.cancel()
    await asyncio.sleep(0.1)
    assert not taking.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await taking
    assert opened[0].closed
