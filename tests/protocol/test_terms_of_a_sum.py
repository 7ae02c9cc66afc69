"""Each field that a device trains by is under the digest of its secure sum, or known to be told it alone."""

import pytest

from fedgrpc.errors import UpdateRefused
from fedgrpc.protocol.secure import check_common
from fedgrpc.protocol.tasks import Registration
from fedgrpc.v1 import aggregator_pb2, privacy_pb2, round_pb2

COMMON = set(privacy_pb2.CommonTerms.DESCRIPTOR.fields_by_name)


def fields(message):
    return set(message.DESCRIPTOR.fields_by_name)


def test_a_field_of_a_task_is_told_to_all_alike_or_harms_nobody_where_it_differs():
    # A device refuses a sum of another kind than training, or with a local model.
    refused = {"kind", "local_model"}
    # Names of the task and of its run; the terms of the run are compared with what the device was built from.
    names = {"token", "run", "terms", "secure"}
    # The order of examples, and times and forms of what is sent. A masked update has one form.
    alone = {"seed", "time_left", "upload_recipe", "uplink_bytes_per_second"}
    # For leaves, which train nothing themselves.
    leaves = {"leaf"}
    assert fields(aggregator_pb2.Task) - COMMON == refused | names | alone | leaves


def test_a_field_that_a_learning_task_is_built_from_is_told_to_all_alike():
    told = fields(aggregator_pb2.RunTerms) | fields(aggregator_pb2.RegisterResponse)
    # `without_metrics` is in the privacy of the task.
    reports = {"run", "describe_model", "tell_channels", "without_metrics"}
    link = {"poll_wait", "heartbeat_interval", "lease", "max_chunk_bytes", "max_payload_bytes"}
    assert told - COMMON == reports | link


TOLD = {
    "run_id": "r",
    "round": 3,
    "model_version": 2,
    "plan": round_pb2.TrainingPlan(epochs=1.0, learning_rate=0.1),
    "evaluate": True,
    "privacy": privacy_pb2.UpdatePrivacy(clip_norm=1.0),
}
BUILT = {"learning_task": "digits", "model": "small", "options": {"share": "0.5"}}
OTHER = {
    "run_id": "s",
    "round": 4,
    "model_version": 1,
    "plan": round_pb2.TrainingPlan(epochs=1.0, learning_rate=1e-9),
    "evaluate": False,
    "privacy": privacy_pb2.UpdatePrivacy(clip_norm=1.0, without_metrics=True),
    "learning_task": "",
    "model": "large",
    "options": {"share": "0.5", "augment": "no"},
}


@pytest.mark.parametrize("field", OTHER)
def test_a_device_refuses_a_task_that_differs_from_what_all_are_told_in(field):
    built = Registration("r", 1.0, 1.0, 1.0, 1, 1, **BUILT)
    task = aggregator_pb2.Task(**TOLD)
    check_common(privacy_pb2.CommonTerms(**TOLD, **BUILT), task, built)
    with pytest.raises(UpdateRefused, match="all devices of the secure sum are told"):
        check_common(privacy_pb2.CommonTerms(**{**TOLD, **BUILT, field: OTHER[field]}), task, built)


def test_every_plan_that_ends_by_a_clock_is_refused():
    plan = round_pb2.TrainingPlan(upload_reserve={"seconds": 3})
    told = {**TOLD, "plan": plan}
    with pytest.raises(UpdateRefused, match="clock"):
        check_common(
            privacy_pb2.CommonTerms(**told), aggregator_pb2.Task(**told), Registration("r", 1.0, 1.0, 1.0, 1, 1)
        )
