"""The page in a real browser, light and dark, wide and narrow, with the keyboard alone."""

import asyncio
import shutil
from contextlib import asynccontextmanager

import pytest

from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.web.page import LINK
from tests.support.hand_driven_device import PATIENCE_S, update_of
from tests.support.pages import served_page
from tests.support.running_federation import running_aggregator
from tests.web.test_page import committed_round

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.async_api", reason="needs playwright: make test-extras")
if CHROMIUM is None:
    pytest.skip("needs a browser: apt-get install chromium", allow_module_level=True)

PHONE = {"width": 390, "height": 844}
MS = 1000 * PATIENCE_S


@asynccontextmanager
async def browsing(url, **look):
    """A page of a browser, and all that it complained of and asked others than this page for."""
    troubles = []
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = await browser.new_page(base_url=url, **look)
        page.set_default_timeout(MS)
        page.on("console", lambda said: said.type == "error" and troubles.append(said.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith((url, "data:")) or troubles.append(asked.url))
        yield page, troubles
        await browser.close()


async def test_a_run_is_watched_live_with_charts_and_without_a_request_to_anybody_else(tmp_path):
    async with running_aggregator(tmp_path, rounds=4) as running, served_page(running) as url:
        await committed_round(running)
        await committed_round(running, 2)
        async with browsing(url) as (page, troubles):
            await page.goto("/runs/default")
            await page.wait_for_selector(".chart canvas")
            assert await page.locator(".chart").count() >= 2
            devices = [await running.device("a"), await running.device("b")]
            tasks = await asyncio.gather(*(device.task() for device in devices))
            await page.wait_for_selector("text=Waiting for")
            pairs = zip(devices, tasks, strict=True)
            await asyncio.gather(*(device.push(task, update_of(1.0)) for device, task in pairs))
            # Of the round that has ended meanwhile, without a reload.
            await page.wait_for_selector("#rounds a[href$='/rounds/3']")
            assert not troubles


async def test_the_list_of_runs_follows_without_a_reload(tmp_path):
    async with running_aggregator(tmp_path, rounds=3) as running, served_page(running) as url:
        await committed_round(running)
        async with browsing(url) as (page, troubles):
            await page.goto("/runs")
            version = page.locator(".run dd").nth(1)
            before = await version.text_content()
            await committed_round(running, 2)
            await page.wait_for_function(
                "told => document.querySelectorAll('.run dd')[1].textContent !== told", arg=before
            )
            assert not troubles


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_nothing_sticks_out_on_a_phone(tmp_path, scheme):
    async with running_aggregator(tmp_path, rounds=2) as running, served_page(running) as url:
        await committed_round(running)
        async with browsing(url, viewport=PHONE, color_scheme=scheme) as (page, troubles):
            grounds = set()
            for path in (
                "/runs",
                "/runs/default",
                "/runs/default/rounds/1",
                "/fleet",
                "/fleet/a",
                "/audit",
                "/sign-in",
            ):
                await page.goto(path)
                wide = await page.evaluate("document.documentElement.scrollWidth")
                assert wide <= PHONE["width"], path
                grounds.add(await page.evaluate("getComputedStyle(document.body).backgroundColor"))
            assert len(grounds) == 1
            light = sum(map(int, grounds.pop().removeprefix("rgb(").removesuffix(")").split(","))) > 380
            assert light == (scheme == "light")
            assert not troubles


async def test_the_fleet_is_searched_while_one_types(tmp_path):
    async with running_aggregator(tmp_path) as running, served_page(running) as url:
        for number in range(60):
            await running.device(f"pi-{number}", device={"device_class": "jetson" if number % 2 else "pi"})
        async with browsing(url) as (page, troubles):
            await page.goto("/fleet")
            assert await page.locator(".fleet tbody tr").count() == 50
            await page.get_by_role("searchbox").press_sequentially("jetson pi-1")
            await page.wait_for_selector("text=1 to 6 of 6")
            assert page.url.endswith("/fleet?text=jetson+pi-1")
            await page.reload()
            assert await page.locator(".fleet tbody tr").count() == 6
            assert not troubles


async def test_an_owner_signs_in_by_the_link_and_ends_the_run_with_the_keyboard_alone(tmp_path):
    async with running_aggregator(tmp_path, rounds=2) as running, served_page(running) as url:
        link = (running.settings.data_dir / "identity" / LINK).read_text().strip()
        async with browsing("") as (page, _):
            await page.goto(link)
            await page.wait_for_url(f"{url}/runs")
            # The skip link, the brand, three pages, sign-out, and then the only run.
            for _ in range(7):
                await page.keyboard.press("Tab")
            await page.keyboard.press("Enter")
            await page.wait_for_url(f"{url}/runs/default")
            await page.get_by_text("End the run").focus()
            await page.keyboard.press("Enter")
            await page.keyboard.press("Tab")
            await page.keyboard.type("tired")
            await page.keyboard.press("Tab")
            await page.keyboard.type("default")
            await page.keyboard.press("Enter")
            await page.wait_for_selector(".pill:text-is('stopped')")
        run = await running.run()
        assert (run.phase, run.reason) == (pb.RUN_PHASE_STOPPED, "tired")
