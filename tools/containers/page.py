"""A browser that has the page of an aggregator open, in a container's network, where this machine has one."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Final

_PATIENCE_S: Final = 120.0

# Takes a picture called NAME of the page at PATH.
Picture = Callable[[str, str], Awaitable[None]]


def why_no_browser() -> str | None:
    """Why no page can be looked at here; None: it can."""
    if find_spec("playwright") is None:
        return "there is no playwright: make test-extras installs it"
    return None if shutil.which("chromium") else "there is no chromium"


@contextlib.asynccontextmanager
async def pictures(namespace: str, url: str, folder: Path) -> AsyncIterator[Picture]:
    """A browser in a network namespace, for as long as the block lasts."""
    process = await asyncio.create_subprocess_exec(
        *("nsenter", f"--net=/run/netns/{namespace}", sys.executable, "-m", "tools.containers.browser"),
        *(url, str(folder)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    streams = process.stdin, process.stdout

    async def picture(name: str, path: str) -> None:
        streams[0].write(f"{name} {path}\n".encode())
        async with asyncio.timeout(_PATIENCE_S):
            while (line := (await streams[1].readline()).decode().strip()) != name:
                if not line:
                    raise RuntimeError("the browser has ended")
                print(f"          page: {line}", flush=True)

    try:
        yield picture
    finally:
        streams[0].close()
        try:
            await asyncio.wait_for(process.wait(), _PATIENCE_S)
        except TimeoutError:
            process.kill()


async def no_pictures(name: str, path: str) -> None:
    """Where there is no browser."""
