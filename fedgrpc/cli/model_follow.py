"""`fedgrpc model follow`: on a device, keep a file at what releases give its applications.

The file is replaced as a whole, by one rename: whoever opens it reads one version, verified to its last byte.

exit code 0     with --once: done
          1     with --once: the worker cannot be reached, or has no model yet
"""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import Any, Final

import click

from fedgrpc.claims import printable
from fedgrpc.cli.options import Declare, SettingsCommand
from fedgrpc.errors import CorruptError, FedgrpcError, LinkError, NotFound, StorageError
from fedgrpc.model_client import WorkerModels, download
from fedgrpc.rpc.channel import Tls, open_channel
from fedgrpc.rpc.retry import Backoff, Retries
from fedgrpc.v1 import worker_pb2

_what = Declare("What")
_where = Declare("Where")
_AGAIN: Final = Backoff(first_s=0.5, cap_s=30.0)
_RETRIED: Final = (LinkError, NotFound, CorruptError, StorageError)


async def _followed(values: dict[str, Any]) -> None:
    tls = None if values["tls_ca"] is None else Tls(values["tls_ca"])
    retries = Retries(_AGAIN)
    async with open_channel(values["worker"], tls) as channel:
        models = WorkerModels(channel)
        while True:
            try:
                async for news in models.watch(values["run"]):
                    if news.HasField("header"):
                        await _take(models, news, values)
                    if values["once"]:
                        if not news.HasField("header"):
                            raise NotFound(f"the worker at {values['worker']} has no model yet")
                        return
                    retries.reset()
            except FedgrpcError as error:
                if values["once"] or not isinstance(error, _RETRIED):
                    raise
                click.echo(printable(f"waiting for the worker: {error}"), err=True)
            await asyncio.sleep(retries.next_delay_s())


async def _take(models: WorkerModels, news: worker_pb2.WatchModelResponse, values: dict[str, Any]) -> None:
    """Write the model that is served now, and run the command that the user wants after it."""
    path: Path = values["to"]
    version = news.header.version
    about = {"run_id": news.run_id, "version": str(version), "release": str(news.release)}
    stream = models.stream_of(values["run"], news.header.manifest.digest)
    await download(stream, path, about)
    by = f"release {news.release}" if news.release else "no release: what the device trains on"
    click.echo(f"{path}: version {version} ({by})")
    if values["run_after"]:
        await asyncio.to_thread(subprocess.run, values["run_after"], shell=True, check=False)


def _run(**values: Any) -> None:
    asyncio.run(_followed(values))


MODEL_FOLLOW = SettingsCommand(
    "model follow",
    _run,
    [
        _what(
            "--to",
            "Safetensors file to keep up to date.",
            type=click.Path(path_type=Path, dir_okay=False),
            required=True,
            metavar="FILE",
        ),
        _what("--run", "Name of the run; without: the one that the worker works for.", type=str, default=""),
        _what("--once", "Write the present model, and end.", is_flag=True, default=False),
        _what(
            "--exec",
            "Shell command to run after each change, to tell the application.",
            name="run_after",
            type=str,
            default="",
            metavar="COMMAND",
        ),
        _where(
            "--worker",
            "Address of the worker's own service (its --serve-address).",
            type=str,
            required=True,
            metavar="HOST:PORT",
        ),
        _where(
            "--tls-ca",
            "Certificates to trust (PEM), where the worker serves with TLS.",
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
            default=None,
        ),
    ],
    "On a device: keep a file at the model that releases give to applications.",
)
