"""Companions of an aggregator's server: its gauges, and its page, which needs the extra `fedgrpc[web]`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from fedgrpc.aggregator.server import Beside
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.aggregator.trust import Trust
from fedgrpc.cli.options import Declare, Setting
from fedgrpc.errors import ExtraMissing, UsageError
from fedgrpc.gauges import Gauges, Sources, kept_fresh

if TYPE_CHECKING:
    from fedgrpc.web.page import PageSettings
    from fedgrpc.web.tls import PageTls

_page = Declare("The page (docs/guide/operate.md)")

PAGE_SETTINGS: list[Setting] = [
    _page(
        "--web-address",
        "Serve the page on this address: on loopback to everybody on this machine, elsewhere to operators with "
        "certificates.",
        default=None,
        metavar="HOST:PORT",
    ),
    _page(
        "--web-host",
        "Further name under which browsers reach the page, as behind a proxy; repeat for each.",
        name="web_hosts",
        multiple=True,
        default=(),
        metavar="NAME",
    ),
]


def beside_of(values: Mapping[str, Any], settings: AggregatorSettings, gauges: Gauges | None) -> Beside:
    """Return what runs beside an aggregator with these settings: its gauges and its page. Raises `UsageError`."""
    serve = _page_of(values, settings)

    @asynccontextmanager
    async def beside(trust: Trust, address: str) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if gauges is not None:
                certificate = None if settings.tls is None else settings.tls.certificate
                sources = Sources(settings.data_dir, trust.identities.members, settings.lives, certificate)
                await stack.enter_async_context(kept_fresh(gauges, address, sources))
            await stack.enter_async_context(serve(trust, address))
            yield

    return beside


def _page_of(values: Mapping[str, Any], settings: AggregatorSettings) -> Beside:
    """Return what serves the page, if there is one. Raises `UsageError`."""
    if values["web_address"] is None:
        if values["web_hosts"]:
            raise UsageError("--web-host goes with --web-address HOST:PORT")
        return lambda trust, address: nullcontext()
    try:
        from fedgrpc.web.page import PageSettings, serve_page
    except ImportError as error:
        raise ExtraMissing.of("--web-address", "web", error) from error
    page = PageSettings(values["web_address"], tuple(values["web_hosts"]))
    return lambda trust, address: serve_page(page, address, trust.folder, _tls(trust, settings, page))


def _tls(trust: Trust, settings: AggregatorSettings, page: PageSettings) -> PageTls | None:
    """Return what the page listens with outside of this machine; None: nothing there says who calls."""
    from fedgrpc.web.tls import AuthorityPageTls, FileTls

    if settings.has_authority:
        return AuthorityPageTls(trust.identities, page.hosts, trust.folder)
    if settings.tls is not None and settings.tls.ca is not None:
        return FileTls(settings.tls)
    return None
