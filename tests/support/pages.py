"""A page of a running aggregator, and a browser's client for it."""

from contextlib import asynccontextmanager

import httpx

from fedgrpc.rpc.address import local_address
from fedgrpc.web.page import LINK, PageSettings, serve_page


@asynccontextmanager
async def served_page(running, tls=None, address="127.0.0.1:0", names=()):
    """The page until the block ends; yields its URL."""
    folder = running.settings.data_dir / "identity"
    with local_address(folder) as local:
        async with serve_page(PageSettings(address, names), local, folder, tls) as url:
            yield url


@asynccontextmanager
async def visited(running, **changes):
    """A client whose requests begin at the page's URL."""
    async with served_page(running, **changes) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        yield client


def origin_of(client):
    return {"origin": str(client.base_url).rstrip("/")}


async def sign_in(running, client):
    """Open the link that only the owner of the data folder can read."""
    link = (running.settings.data_dir / "identity" / LINK).read_text().strip()
    secret = link.partition("#")[2]
    answer = await client.post("/sign-in", data={"secret": secret}, headers=origin_of(client))
    assert answer.status_code == 303, answer.text
    return secret
