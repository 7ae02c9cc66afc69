"""The page of an aggregator that hosts several runs."""

from types import SimpleNamespace

from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.web.views import queue_of
from tests.support.many_runs import QUICK, hosting
from tests.support.pages import visited
from tests.web.test_page import text_of


async def test_every_run_has_its_page_and_the_queue_says_who_waits_for_workers(tmp_path):
    served = SimpleNamespace(settings=SimpleNamespace(data_dir=tmp_path / "aggregator"))
    async with hosting(tmp_path) as (_, client, _):
        await client.submit("north", {**QUICK, "priority": "3"})
        await client.submit("south", {**QUICK, "requires": "memory >= 900TB"})
        async with visited(served) as page:
            listed = await text_of(page, "/runs")
            queue = listed[listed.index("Queue") :]
            assert queue.index("north") < queue.index("south")
            assert "memory &gt;= 900TB" in queue
            for name in ("north", "south"):
                assert f"<h1>{name}</h1>" in await text_of(page, f"/runs/{name}")
            for path in ("/runs/east", "/runs/east/live", "/runs/east/series.json", "/runs/north/rounds/77"):
                await text_of(page, path, status=404)
            assert "min_workers=2, " in await text_of(page, "/audit")


def test_the_queue_is_in_the_order_of_the_scheduler():
    runs = [
        pb.RunSummary(name="served", priority=9),
        pb.RunSummary(name="scarce", wanted_workers=1, eligible_workers=2),
        pb.RunSummary(name="plain", wanted_workers=1, eligible_workers=9),
        pb.RunSummary(name="first", wanted_workers=1, eligible_workers=9, priority=5),
        pb.RunSummary(name="overdue", wanted_workers=1, eligible_workers=9, priority=-5),
    ]
    runs[-1].waiting.seconds = 90
    assert [run.name for run in queue_of(runs)] == ["overdue", "first", "scarce", "plain"]
