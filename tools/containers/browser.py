"""A page that stays open in headless chromium, and pictures of it: python -m tools.containers.browser URL FOLDER.

Each line of standard input is NAME PATH: a picture of the page at PATH into FOLDER/NAME.png. A PATH of - is the
page that was opened first, as it is now: it is never loaded again. Answers with one line each, until the input
ends. Lines that begin with ! are what the page complained of.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path
from typing import Any, Final

_SIZE: Final = {"width": 1280, "height": 900}
# Charts draw, and the live round arrives.
_SETTLE_MS: Final = 1500


async def serve(url: str, folder: Path) -> None:
    """Take pictures until standard input ends."""
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        kept: Any = None
        while line := (await asyncio.to_thread(sys.stdin.readline)).split():
            name, path = line
            if path == "-" and kept is not None:
                page = kept
            else:
                page = await browser.new_page(base_url=url, viewport=_SIZE)
                page.on("pageerror", lambda error: print(f"! {error}", flush=True))
                await page.goto(path)
                kept = kept or page
            await page.wait_for_timeout(_SETTLE_MS)
            await page.screenshot(path=folder / f"{name}.png")
            if page is not kept:
                await page.close()
            print(name, flush=True)
        await browser.close()


if __name__ == "__main__":
    Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
    asyncio.run(serve(sys.argv[1], Path(sys.argv[2])))
