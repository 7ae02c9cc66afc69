"""The aggregator's page in its container, and a browser that has it open, where this machine has both."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from tools.containers.podman import AGGREGATOR_IMAGE, podman

PAGE_IMAGE: Final = "localhost/fedgrpc-aggregator-page:dev"
# What fedgrpc[web] brings; markupsafe does without its compiled half under another Python.
_PACKAGES: Final = ("starlette", "uvicorn", "jinja2", "markupsafe", "h11", "anyio", "idna", "click")
_PATIENCE_S: Final = 120.0

# Takes a picture called NAME of the page at PATH.
Picture = Callable[[str, str], Awaitable[None]]


def make_page_image(folder: Path) -> str | None:
    """The aggregator's image with the page's packages of this Python, under `PAGE_IMAGE`; else why not."""
    for package in (*_PACKAGES, "playwright"):
        if find_spec(package) is None:
            return f"there is no {package}: make test-extras installs it"
    if shutil.which("chromium") is None:
        return "there is no chromium"
    packages = folder / "packages"
    for package in _PACKAGES:
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        shutil.copytree(Path(spec.origin).parent, packages / package)
    (folder / "Dockerfile").write_text(f"FROM {AGGREGATOR_IMAGE}\nCOPY packages /opt/app\n")
    podman("build", "--format", "docker", "--isolation", "chroot", "--tag", PAGE_IMAGE, str(folder))
    return None


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
