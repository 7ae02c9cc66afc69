"""An ingest process of an aggregator: it relays calls, stores uploads and serves downloads.

    ingest_uploads      chunks of an update into the run's folder
    ingest_downloads    chunks of an encoded model out of it

`python -m fedgrpc.aggregator.ingest` is one (`fedgrpc.rpc.ingest`).
"""

from __future__ import annotations

from typing import Any, Final

from fedgrpc.aggregator.chunk_cache import CACHE_BYTES, SENDING_BYTES
from fedgrpc.aggregator.ingest_downloads import DOWNLOAD, IngestDownloads
from fedgrpc.aggregator.ingest_uploads import IngestUploads
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.aggregator.update_checks import DECODING_BYTES
from fedgrpc.logging import chosen, configure
from fedgrpc.process import keep_private
from fedgrpc.rpc.ingest import Ingest
from fedgrpc.rpc.ingest_process import Caller, Work, be_ingest_process

_MODULE: Final = "fedgrpc.aggregator.ingest"


def ingest_of(settings: AggregatorSettings) -> Ingest | None:
    """Return the ingest processes that the settings ask for; all together have the memory of one process."""
    count = settings.ingest
    if not count:
        return None
    bounds = {
        "upload_bytes": max(1, settings.max_upload_memory_bytes // count),
        "decoding_bytes": DECODING_BYTES // count,
        "cache_bytes": CACHE_BYTES // count,
        "sending_bytes": SENDING_BYTES // count,
    }
    return Ingest(count, _MODULE, {**bounds, "logs": chosen()})


def _work(start: dict[str, Any]) -> Work:
    """Return what does the work of this process, from what the run's process has started it with."""
    configure(*start["logs"])
    keep_private()
    uploads = IngestUploads(start["upload_bytes"], start["decoding_bytes"])
    downloads = IngestDownloads(start["cache_bytes"], start["sending_bytes"])

    async def do(order: bytes, caller: Caller) -> bytes:
        is_download = order[4 : 4 + len(DOWNLOAD)] == DOWNLOAD
        return await (downloads.send if is_download else uploads.take)(order, caller)

    return do


if __name__ == "__main__":
    be_ingest_process(_work)
