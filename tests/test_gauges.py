"""Gauges of the present: runs, disk, members and certificates as they are now."""

import time

import pytest
from prometheus_client import CollectorRegistry

from fedgrpc.calls import connect
from fedgrpc.errors import FedgrpcError
from fedgrpc.gauges import Gauges, Sources, refresh
from fedgrpc.identity.certificates import Authority, make_key, pem_of
from fedgrpc.identity.members import Lives, Member, MemberState
from fedgrpc.identity.roles import Role
from fedgrpc.v1.aggregator_pb2 import RunSummary
from tests.support.running_federation import running_aggregator

DAY_S = 86_400.0


@pytest.fixture
def gauges():
    return Gauges(CollectorRegistry())


def value(gauges, name, **labels):
    return gauges._registry.get_sample_value(name, labels)


def member(name, state, expires_at):
    return Member(name, Role.TRAINER, b"key", state, 0.0, expires_at)


def test_a_run_that_is_gone_makes_room(gauges):
    gauges.show_runs([RunSummary(name="a", phase="RUN_PHASE_RUNNING", current_round=7, wanted_workers=2)])
    assert value(gauges, "fedgrpc_run_phase", run="a", phase="running") == 1
    assert value(gauges, "fedgrpc_run_phase", run="a", phase="paused") == 0
    assert value(gauges, "fedgrpc_run_round", run="a") == 7
    assert value(gauges, "fedgrpc_run_workers", run="a", state="wanted") == 2
    gauges.show_runs([RunSummary(name="b", phase="RUN_PHASE_PAUSED")])
    assert value(gauges, "fedgrpc_run_round", run="a") is None
    assert value(gauges, "fedgrpc_run_phase", run="b", phase="paused") == 1


def test_those_who_can_renew_for_a_few_days_more_are_about_to_leave(gauges):
    lives = Lives(grace_s=30 * DAY_S)
    now = 100 * DAY_S
    members = [
        member("fresh", MemberState.ACTIVE, now + DAY_S),
        member("off", MemberState.ACTIVE, now - 28 * DAY_S),
        member("gone", MemberState.ACTIVE, now - 31 * DAY_S),
        member("out", MemberState.REVOKED, now - 28 * DAY_S),
        member("new", MemberState.PENDING, now + DAY_S),
    ]
    gauges.show_members(members, lives, now)
    assert value(gauges, "fedgrpc_members_leaving") == 1
    assert value(gauges, "fedgrpc_members", state="active") == 3
    assert value(gauges, "fedgrpc_members", state="pending") == 1


def test_the_end_of_a_certificate_is_shown_once_it_is_known(gauges, tmp_path):
    assert value(gauges, "fedgrpc_certificate_end_seconds") is None
    end = time.time() // 1 + 10 * DAY_S
    path = tmp_path / "server.pem"
    path.write_bytes(pem_of(Authority.make().issue_server(make_key().public_key(), ["localhost"], end)))
    gauges.show_certificate(path)
    gauges.show_certificate(path)
    assert value(gauges, "fedgrpc_certificate_end_seconds") == end
    path.write_text("no certificate")
    with pytest.raises(FedgrpcError):
        gauges.show_certificate(path)


async def test_a_running_aggregator_is_shown_as_it_is(gauges, tmp_path):
    async with running_aggregator(tmp_path) as running, connect(running.address) as client:
        await running.device("a")
        settings = running.settings
        await refresh(gauges, client, Sources(settings.data_dir, lambda: [], settings.lives))
    assert value(gauges, "fedgrpc_serving") == 1
    assert value(gauges, "fedgrpc_data_free_bytes") > 0
    assert value(gauges, "fedgrpc_run_phase", run="default", phase="running") == 1
    assert value(gauges, "fedgrpc_run_workers", run="default", state="eligible") == 1
