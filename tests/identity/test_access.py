"""The table of RPCs and roles: every RPC of every service has a row, and devices read nothing of others."""

import pytest
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from fedgrpc.errors import NotEnrolled, UsageError, WrongIdentity
from fedgrpc.identity.access import ROLES, check_call
from fedgrpc.identity.roles import (
    DEVICE_ROLES,
    LOCAL,
    OPERATOR_ROLES,
    Identity,
    Role,
    checked_name,
    identity_from,
    uri_of,
)
from fedgrpc.v1 import aggregator_pb2, identity_pb2, models_pb2, worker_pb2

FILES = (aggregator_pb2, identity_pb2, models_pb2, worker_pb2, health_pb2, reflection_pb2)
METHODS = [
    f"/{service.full_name}/{method.name}"
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


def test_the_tests_know_every_service_of_the_protocol():
    pool = descriptor_pool.Default()
    ours = {
        pool.FindFileByName(f"fedgrpc/v1/{name}.proto") for name in ("aggregator", "identity", "models", "worker")
    }
    assert ours == {file.DESCRIPTOR for file in FILES[:4]}


@pytest.mark.parametrize("method", METHODS)
def test_every_rpc_has_a_row(method):
    assert method in ROLES


def test_no_row_is_of_an_rpc_that_is_gone():
    gone = ROLES.keys() - METHODS
    assert {method.split("/")[1] for method in gone} <= {
        "grpc.reflection.v1.ServerReflection",
        "grpc.health.v1.Health",
    }


def test_what_has_no_row_is_refused_to_everybody_from_outside():
    for role in Role:
        with pytest.raises(WrongIdentity, match="may not call"):
            check_call(Identity("x", role), "/fedgrpc.v1.Aggregator/Unheard")
    check_call(LOCAL, "/fedgrpc.v1.Aggregator/Unheard")


def test_devices_read_nothing_of_others_steer_nothing_and_admit_nobody():
    for role in DEVICE_ROLES:
        may = {method.rpartition("/")[2] for method, roles in ROLES.items() if role in roles}
        work = {
            "Register",
            "DescribeModel",
            "PollTask",
            "PollTasks",
            "PullModel",
            "Heartbeat",
            "PushUpdate",
            "QueryPush",
            "ExchangeParts",
        }
        releases = {"PullVersion", "FollowReleases", "ReportRelease"}
        assert may == work | releases | {"ReportFailure", "Leave", "Renew", "Check", "Watch", "List"}


def test_the_bearer_of_a_token_may_only_join():
    assert [method for method, roles in ROLES.items() if Role.JOINING in roles] == ["/fedgrpc.v1.Identity/Enroll"]


def test_viewers_change_nothing_and_only_admins_admit():
    steering = ("Pause", "Resume", "RollBack", "Stop", "Submit", "Set", "Clone", "Remove")
    changing = (*steering, "Create", "Delete", "Approve", "Revoke", "Rename", "Forget")
    for method, roles in ROLES.items():
        name = method.rpartition("/")[2]
        if method.startswith(("/fedgrpc.v1.Aggregator", "/fedgrpc.v1.Identity")) and name.startswith(changing):
            assert Role.VIEWER not in roles
        if name.startswith(("Create", "Approve", "Delete", "Rename", "Forget")):
            assert roles == {Role.ADMIN}


def test_nobody_from_outside_calls_the_service_of_a_device():
    assert not any(roles for method, roles in ROLES.items() if method.startswith("/fedgrpc.v1.Worker/"))


@pytest.mark.parametrize("uri", ["fedgrpc://f1/trainer/pi-7", "spiffe://example.org/fedgrpc/trainer/pi-7"])
def test_a_certificate_gives_name_and_role_by_its_uri(uri):
    assert identity_from(["https://other", uri]) == Identity("pi-7", Role.TRAINER)
    assert uri_of("f1", Role.TRAINER, "pi-7") == "fedgrpc://f1/trainer/pi-7"


@pytest.mark.parametrize(
    "uris",
    [
        [],
        ["pi-7"],
        ["fedgrpc://f/trainer/a", "fedgrpc://f/admin/a"],
        ["fedgrpc://f/joining/a"],
        ["fedgrpc://f/root/a"],
        ["fedgrpc://f/trainer/a/b"],
        ["fedgrpc://f/trainer/a b"],
        ["fedgrpc://f/trainer/" + "a" * 65],
        ["spiffe://f/trainer/a"],
        ["xfedgrpc://f/trainer/a"],
    ],
)
def test_other_uris_give_no_identity(uris):
    with pytest.raises(NotEnrolled):
        identity_from(uris)


def test_a_device_acts_under_its_own_name_and_a_leaf_also_for_its_evaluators():
    Identity("pi-7", Role.TRAINER).check_worker("pi-7")
    leaf = Identity("leaf", Role.LEAF)
    leaf.check_worker("leaf.evaluators")
    assert (leaf.role_of("leaf"), leaf.role_of("leaf.evaluators")) == (Role.LEAF, Role.EVALUATOR)
    for caller, worker in (("pi-7", "pi-8"), ("pi-7", "pi-7.evaluators"), ("pi-7", "")):
        with pytest.raises(WrongIdentity, match="does not speak for"):
            Identity(caller, Role.TRAINER).check_worker(worker)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a" * 65, "ä", "a\n"])
def test_names_are_bounded(name):
    with pytest.raises(UsageError):
        checked_name(name)


def test_every_role_is_a_device_s_or_an_operator_s_or_joining():
    assert {*DEVICE_ROLES, *OPERATOR_ROLES, Role.JOINING} == set(Role)
