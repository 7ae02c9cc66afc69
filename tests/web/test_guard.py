"""Hosts and origins: what reaches the page at all."""

import httpx
import pytest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from fedgrpc.web.guard import Guard, host_of, same_origin


@pytest.mark.parametrize(
    ("header", "host"),
    [
        ("localhost", "localhost"),
        ("LocalHost:8080", "localhost"),
        ("127.0.0.1:80", "127.0.0.1"),
        ("[::1]:8080", "::1"),
        ("[::1]", "::1"),
        ("page.example.:443", "page.example"),
        ("evil.example:8080:80", "evil.example:8080"),
        ("", ""),
        (":8080", ":8080"),
    ],
)
def test_a_host_is_read_without_its_port(header, host):
    assert host_of(header) == host


@pytest.mark.parametrize(
    ("headers", "ours"),
    [
        ({"origin": "http://localhost:8080"}, True),
        ({"origin": "https://localhost:8080"}, True),
        ({"origin": "http://localhost:8080", "sec-fetch-site": "same-origin"}, True),
        ({"origin": "http://localhost:8080", "sec-fetch-site": "same-site"}, False),
        ({"origin": "http://localhost:3000"}, False),
        ({"origin": "http://evil.example"}, False),
        ({"origin": "null"}, False),
        ({"origin": "http://[broken"}, False),
        ({}, False),
    ],
)
def test_a_change_comes_from_a_page_of_this_very_origin(headers, ours):
    assert same_origin(Headers({"host": "localhost:8080", **headers})) is ours


def guarded():
    routes = [Route("/", lambda request: PlainTextResponse("hello"), methods=["GET", "POST"])]
    return Guard(Starlette(routes=routes), ("localhost", "127.0.0.1"))


async def ask(method="GET", url="http://localhost:8080/", **headers):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(guarded())) as client:
        return await client.request(method, url, headers=headers)


async def test_a_name_of_somebody_else_that_leads_here_is_refused():
    assert (await ask()).status_code == 200
    assert (await ask(host="evil.example:8080")).status_code == 421


async def test_only_get_and_post_of_bounded_addresses_pass():
    assert (await ask("DELETE")).status_code == 405
    assert (await ask(url="http://localhost:8080/?" + "a" * 5000)).status_code == 414
    assert (await ask("POST")).status_code == 403
    assert (await ask("POST", origin="http://localhost:8080")).status_code == 200


async def test_no_answer_lets_a_browser_load_or_run_anything_from_elsewhere():
    headers = (await ask()).headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
