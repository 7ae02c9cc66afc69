"""Search, order and pages of a large fleet."""

import time

import pytest

from fedgrpc.v1.aggregator_pb2 import Run, WorkerRecord
from fedgrpc.web import fleet
from fedgrpc.web.fleet import PAGE_ROWS, FleetQuery, fleet_page, plan_of, power_of, state_of


def worker(name, state="IDLE", ago=0.0, endings=None, **device):
    record = WorkerRecord(worker=name, state=f"WORKER_STATE_{state}", device=device, endings=endings or {})
    record.last_seen_ago.FromNanoseconds(int(ago * 1e9))
    return record


FLEET = [
    worker("pi-1", device_class="raspberry-pi-4", labels={"site": "north"}),
    worker("pi-2", "BUSY", device_class="raspberry-pi-4"),
    worker("pi-10", "AWAY", 3600, {"accepted": 3, "slow upload": 2}, device_class="raspberry-pi-5"),
    worker("nano-1", "IDLE", 60, {"failed": 5}, device_class="jetson-nano"),
    worker("lost-1", "REVOKED", 60, device_class="jetson-nano"),
]


def names(page):
    return [each.worker for each in page.workers]


def test_words_are_looked_for_in_names_classes_and_labels():
    assert names(fleet_page(FLEET, FleetQuery(text="PI-4"))) == ["pi-1", "pi-2"]
    assert names(fleet_page(FLEET, FleetQuery(text="site=north pi"))) == ["pi-1"]
    assert names(fleet_page(FLEET, FleetQuery(text="nothing like it"))) == []


def test_states_tell_a_silent_worker_from_an_idle_one():
    assert [state_of(each) for each in FLEET] == ["idle", "busy", "away", "silent", "revoked"]
    assert names(fleet_page(FLEET, FleetQuery(show="silent"))) == ["nano-1"]
    page = fleet_page(FLEET, FleetQuery(show="trouble", order="failures"))
    assert names(page) == ["nano-1", "pi-10"]
    assert page.counts == {"busy": 1, "idle": 1, "silent": 1, "away": 1, "revoked": 1, "trouble": 2}


def test_a_page_behind_the_last_is_the_last():
    page = fleet_page(FLEET, FleetQuery(page=99))
    assert page.query.page == page.pages == 1
    assert page.first == 1


@pytest.mark.parametrize(
    "parameters",
    [
        {"page": "-1"},
        {"page": "9" * 40},
        {"page": "٣"},
        {"show": "<script>"},
        {"order": "__class__"},
        {"text": "\x00" * 1000},
    ],
)
def test_what_cannot_be_meant_counts_as_not_given(parameters):
    assert FleetQuery.parse(parameters) == FleetQuery()


def test_the_address_of_a_query_gives_the_query_again():
    query = FleetQuery("a b&c", "away", "seen", 3)
    address = query.url()
    from urllib.parse import parse_qsl

    assert FleetQuery.parse(dict(parse_qsl(address.partition("?")[2]))) == query
    assert FleetQuery().url() == "/fleet"


def test_ten_thousand_devices_are_searched_and_paged():
    many = [worker(f"device-{n}", device_class=f"class-{n % 7}", ago=n) for n in range(10_000)]
    begun = time.process_time()
    page = fleet_page(many, FleetQuery(text="class-3", order="seen", page=2))
    took_s = time.process_time() - begun
    assert page.found == 1429
    assert len(page.workers) == PAGE_ROWS
    assert page.workers[0].worker == f"device-{3 + 7 * (1428 - 50)}"
    # Of processor time: some 0.2 s on an idle machine.
    assert took_s < 5


def test_power_is_told_as_far_as_it_is_reported():
    assert power_of(worker("a")) == ""
    assert power_of(worker("a", on_battery=True)) == "battery"
    reported = worker("a", on_battery=True)
    reported.conditions.on_mains = True
    reported.conditions.battery = 0.8
    assert power_of(reported) == "mains 80%"


def test_the_plan_is_that_of_the_device_class():
    run = Run()
    run.local_models.classes["raspberry-pi-4"].sub_model = "prefix:0.5"
    assert "0.5" in plan_of(FLEET[0], run)
    assert plan_of(FLEET[3], run) == ""


def test_every_order_sorts_a_fleet_of_which_nothing_is_known():
    for order in fleet.ORDERS:
        assert fleet_page([worker("a"), worker("b")], FleetQuery(order=order)).found == 2
