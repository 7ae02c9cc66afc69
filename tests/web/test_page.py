"""The page of a real aggregator over HTTP on this machine."""

import asyncio
import json

import httpx
import pytest

from fedgrpc.calls import connect
from fedgrpc.errors import Exhausted, UsageError, WrongIdentity
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1.round_pb2 import TASK_PHASE_FAILED
from fedgrpc.web.page import LINK, PageSettings
from fedgrpc.web.visitors import LocalVisitors
from tests.support.hand_driven_device import PATIENCE_S, update_of
from tests.support.pages import origin_of, served_page, sign_in, visited
from tests.support.running_federation import running_aggregator

# Names that a peer chooses, and what a browser would make of them.
HOSTILE = "<script>alert(1)</script>"


async def committed_round(running, number=1):
    """Play a round of two devices by hand."""
    devices = [await running.device(name, device={"device_class": "pi"}) for name in ("a", "b")]
    tasks = await asyncio.gather(*(device.task() for device in devices))
    pairs = zip(devices, tasks, strict=True)
    await asyncio.gather(*(device.push(task, update_of(1.0)) for device, task in pairs))
    return await running.until_ended(number)


async def text_of(client, path, status=200):
    answer = await client.get(path)
    assert answer.status_code == status, answer.text
    return answer.text


async def test_every_page_is_shown_of_a_run_that_has_committed_a_round(tmp_path):
    async with running_aggregator(tmp_path, rounds=2) as running, visited(running) as client:
        await committed_round(running)
        assert "default" in await text_of(client, "/runs")
        run = await text_of(client, "/runs/default")
        assert "2 of 2" in run
        assert "committed" in run
        assert "accepted" in await text_of(client, "/runs/default/rounds/1")
        fleet = await text_of(client, "/fleet?text=pi")
        assert "2 devices" in fleet
        assert "1 of 1" in await text_of(client, "/fleet?part=rows&text=b")
        device = await text_of(client, "/fleet/a")
        assert "T_local" in device
        assert "Nothing has been recorded" in await text_of(client, "/audit")
        assert "secret" in await text_of(client, "/sign-in")
        assert (await client.get("/")).headers["location"] == "/runs"


async def test_charts_get_a_column_for_each_round(tmp_path):
    async with running_aggregator(tmp_path, rounds=2) as running, visited(running) as client:
        await committed_round(running)
        series = (await client.get("/runs/default/series.json")).json()
        assert series["rounds"] == [1]
        assert series["upload_bytes"][0] > 0
        await committed_round(running, 2)
        assert (await client.get("/runs/default/series.json")).json()["rounds"] == [1, 2]


async def test_what_does_not_exist_has_a_page_that_says_so(tmp_path):
    async with running_aggregator(tmp_path) as running, visited(running) as client:
        rounds = [f"/runs/default/rounds/{number}" for number in (7, 1 << 64, "9" * 50)]
        for path in ("/nowhere", "/fleet/nobody", *rounds, "/static/../app.py", "/static/x"):
            answer = await client.get(path)
            assert answer.status_code == 404, path
            assert "content-security-policy" in answer.headers
        assert (await client.get("/audit?from=x")).status_code == 400


async def test_texts_of_peers_are_shown_and_never_run(tmp_path):
    async with running_aggregator(tmp_path) as running, visited(running) as client:
        profile = {"device_class": HOSTILE, "cpu_model": HOSTILE, "labels": {HOSTILE: HOSTILE}}
        device = await running.device("a", device=profile)
        other = await running.device("b")
        task, _ = await asyncio.gather(device.task(), other.task())
        await device.give_back(task, HOSTILE)
        await running.until_task("a", TASK_PHASE_FAILED)
        for path in ("/runs/default", "/fleet", "/fleet/a", "/runs/default/rounds/1", f"/fleet?text={HOSTILE}"):
            answer = await client.get(path)
            assert HOSTILE not in answer.text, path
        assert "&lt;script&gt;" in await text_of(client, "/fleet/a")
        assert "&lt;script&gt;" in await text_of(client, "/runs/default")


async def test_a_round_in_progress_is_streamed_as_it_changes(tmp_path):
    async with running_aggregator(tmp_path) as running, visited(running) as client:
        devices = [await running.device("a"), await running.device("b")]
        tasks = await asyncio.gather(*(device.task() for device in devices))
        heard = []
        async with asyncio.timeout(PATIENCE_S), client.stream("GET", "/runs/default/live") as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            async for line in stream.aiter_lines():
                if not line.startswith("data: "):
                    continue
                heard.append(json.loads(line.removeprefix("data: ")))
                if len(heard) == 1:
                    assert "Round 1" in heard[0]["html"]
                    pairs = zip(devices, tasks, strict=True)
                    await asyncio.gather(*(device.push(task, update_of(1.0)) for device, task in pairs))
                if heard[-1]["ended"]:
                    break
        assert "finished" in heard[-1]["html"]
        assert heard[0]["mark"] != heard[-1]["mark"]


async def test_who_has_not_signed_in_changes_nothing(tmp_path):
    async with running_aggregator(tmp_path, rounds=2) as running, visited(running) as client:
        for path in ("/runs/default/pause", "/runs/default/stop", "/fleet/a/revoke"):
            assert (await client.post(path, headers=origin_of(client))).status_code == 403
        assert "Pause" not in await text_of(client, "/runs/default")
        assert (await running.run()).phase == pb.RUN_PHASE_RUNNING


async def test_the_owner_of_the_data_folder_steers_with_the_link(tmp_path):
    async with running_aggregator(tmp_path, rounds=2) as running, visited(running) as client:
        ours = origin_of(client)
        await sign_in(running, client)
        assert "Pause" in await text_of(client, "/runs/default")
        assert (await client.post("/runs/default/pause", headers=ours)).status_code == 303
        assert (await running.run()).phase == pb.RUN_PHASE_PAUSED
        assert (await client.post("/runs/default/resume", headers=ours)).status_code == 303
        assert (await running.run()).phase == pb.RUN_PHASE_RUNNING
        refused = await client.post("/runs/default/stop", data={"confirm": "another"}, headers=ours)
        assert refused.status_code == 400
        form = {"confirm": "default", "why": "enough"}
        assert (await client.post("/runs/default/stop", data=form, headers=ours)).status_code == 303
        run = await running.run()
        assert (run.phase, run.reason) == (pb.RUN_PHASE_STOPPED, "enough")
        assert (await client.post("/runs/default/pause", headers=ours)).status_code == 409
        assert "StopRun" in await text_of(client, "/audit?text=stoprun")
        assert (await client.post("/sign-out", headers=ours)).status_code == 303
        assert (await client.post("/runs/default/resume", headers=ours)).status_code == 403


async def test_another_sites_page_changes_nothing_even_for_who_has_signed_in(tmp_path):
    async with running_aggregator(tmp_path, rounds=2) as running, visited(running) as client:
        await sign_in(running, client)
        for headers in (
            {},
            {"origin": "http://evil.example"},
            {"origin": "null"},
            {"origin": "http://localhost:1"},
        ):
            assert (await client.post("/runs/default/pause", headers=headers)).status_code == 403
        crossing = {**origin_of(client), "sec-fetch-site": "cross-site"}
        assert (await client.post("/runs/default/pause", headers=crossing)).status_code == 403
        assert (await client.get("/runs", headers={"host": "evil.example"})).status_code == 421
        assert (await running.run()).phase == pb.RUN_PHASE_RUNNING


async def test_the_link_is_private_and_goes_with_the_page(tmp_path):
    async with running_aggregator(tmp_path) as running:
        link = running.settings.data_dir / "identity" / LINK
        async with visited(running) as client:
            assert link.stat().st_mode & 0o777 == 0o600
            answer = await client.post("/sign-in", data={"secret": "wrong"}, headers=origin_of(client))
            assert answer.status_code == 403
            assert "set-cookie" not in answer.headers
            cookie = (
                await client.post(
                    "/sign-in",
                    data={"secret": link.read_text().strip().partition("#")[2]},
                    headers=origin_of(client),
                )
            ).headers["set-cookie"]
            assert "HttpOnly" in cookie
            assert "SameSite=strict" in cookie
        assert not link.exists()


async def test_forms_are_bounded(tmp_path):
    async with running_aggregator(tmp_path) as running, visited(running) as client:
        answer = await client.post("/sign-in", content=b"a" * 100_000, headers=origin_of(client))
        assert answer.status_code == 400


async def test_a_further_name_of_the_page_is_given_by_the_operator(tmp_path):
    async with running_aggregator(tmp_path) as running, visited(running, names=("fleet.example",)) as client:
        assert (await client.get("/runs", headers={"host": "fleet.example"})).status_code == 200


async def test_a_port_in_use_and_an_address_outside_without_certificates_are_refused(tmp_path):
    async with running_aggregator(tmp_path) as running, served_page(running) as url:
        with pytest.raises(UsageError, match="in use"):
            async with served_page(running, address=f"127.0.0.1:{httpx.URL(url).port}"):
                pass
        with pytest.raises(UsageError, match="certificates"):
            async with served_page(running, address="0.0.0.0:0"):
                pass


def test_the_names_of_a_page_on_loopback_are_those_of_this_machine():
    assert PageSettings("127.0.0.1:8080").hosts == ("localhost", "127.0.0.1", "::1")
    assert "fleet.example" in PageSettings("localhost:8080", ("Fleet.Example",)).hosts


def test_sessions_end_and_guesses_are_paced():
    now = [0.0]
    visitors = LocalVisitors(lambda: now[0])
    for _ in range(20):
        with pytest.raises(WrongIdentity):
            visitors.sign_in("guess")
    with pytest.raises(Exhausted):
        visitors.sign_in(visitors.secret)
    now[0] = 61.0
    cookies = [visitors.sign_in(visitors.secret) for _ in range(150)]
    assert len(set(cookies)) == 150
    assert len(visitors._sessions) == 100


async def test_releases_of_a_run_are_listed_with_what_is_watched(tmp_path):
    async with running_aggregator(tmp_path, rounds=2) as running, visited(running) as client:
        await committed_round(running)
        assert "Releases" not in await text_of(client, "/runs/default")
        async with connect(running.address) as steering:
            await steering.models.start_release("default", "2", "a", ["accuracy>=0.9"], 60.0, None)
        run = await text_of(client, "/runs/default")
        assert "canary" in run
        assert "accuracy at least 0.9" in run
