"""A device's part in a secure sum, against an aggregator that asks for what no honest one does."""

import asyncio
import io

import numpy as np
import pytest

from fedgrpc.codec.model_digest import model_digest
from fedgrpc.codec.payload import write_payload
from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import LayoutError, UpdateRefused, UsageError
from fedgrpc.privacy.one_time_keys import Secrets
from fedgrpc.privacy.secure_sum import Circle
from fedgrpc.privacy.secure_vector import SecureVector
from fedgrpc.protocol.secure import SecureTerms, common_terms, keys_to_proto
from fedgrpc.protocol.tasks import Registration, task_from_proto
from fedgrpc.protocol.tensors import manifest_to_proto
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1.privacy_pb2 import CommonTerms
from fedgrpc.v1.round_pb2 import TrainingPlan
from fedgrpc.v1.worker_pb2 import StoredModel
from fedgrpc.worker.client import Told
from fedgrpc.worker.delivery import Delivery
from fedgrpc.worker.held_model import HeldModel
from fedgrpc.worker.local_work import TaskFiles
from fedgrpc.worker.secure_memory import SecureMemory
from fedgrpc.worker.secure_part import SecurePart
from fedgrpc.worker.settings import WorkerSettings
from fedgrpc.worker.spool import Spool
from fedgrpc.worker.status import Status, StatusPublisher
from tests.support.sealed_shares import sealed_to

SECRETS = {name: Secrets(bytes([number]) * 32) for number, name in enumerate("bcd", start=1)}
OTHERS = {name: secrets.public for name, secrets in SECRETS.items()}
UPDATE = {"w": np.zeros((2, 3), np.float32)}
REGISTRATION = Registration(
    "r", 1.0, 1.0, 1.0, 1 << 16, 1 << 20, "package:Task", "cnn", "r", options={"depth": "2"}
)


def part_with(tmp_path, shapes):
    """The part of a device that knows the roster, in a sum of tensors of these shapes."""
    memory = SecureMemory(tmp_path / "secure")
    keys = memory.public_keys()
    circle = Circle(b"s", "a", OTHERS, {name: place for place, name in enumerate("abcd", start=1)}, 2)
    shares = sealed_to(circle, keys, SECRETS)
    memory.fix("t", memory.begin("t", circle, keys).with_roster(frozenset("abcd"), shares))
    vector = SecureVector(shapes, dict.fromkeys(shapes, 1.0), 8, 0, 4)
    return SecurePart(memory, None, "t", SecureTerms(circle, keys, vector, CommonTerms()))


@pytest.mark.parametrize(
    "shapes",
    [
        {"w": (2, 3), "other": (1,)},
        {"w": (6,)},
        # 100 GB: refused before there is memory for it.
        {"w": (1 << 18, 1 << 18)},
    ],
)
def test_a_vector_of_other_tensors_than_the_update_is_refused(tmp_path, shapes):
    with pytest.raises(LayoutError, match="tensors"):
        part_with(tmp_path, shapes).masked(UPDATE, 1, np.random.default_rng(0))


def test_the_tensors_of_the_task_are_masked_and_no_others(tmp_path):
    update = {**UPDATE, "more": np.ones(5, np.float32)}
    packed = part_with(tmp_path, {"w": (2, 3)}).masked(update, 1, np.random.default_rng(0))
    # Six values and the weight, of 8 bits and 2 for the sum of four.
    assert packed.size == (7 * 10 + 7) // 8


def publisher():
    return StatusPublisher(Status("a", "127.0.0.1:1"))


def secure_task(**changes):
    message = pb.Task(
        **{"token": "t", "run": "r", "round": 1, "kind": TaskKind.TRAIN, "model_version": 1, **changes}
    )
    message.secure.SetInParent()
    return message


@pytest.mark.parametrize(
    "message",
    # What a personal layer or a kept-back tensor learned would be in the sum.
    [secure_task(kind=TaskKind.EVALUATE), secure_task(local_model={"personal_layers": ["w"]})],
    ids=["scores", "personal layers"],
)
def test_a_secure_sum_of_anything_but_whole_updates_is_refused(tmp_path, message):
    settings = WorkerSettings(name="a", aggregator="127.0.0.1:1", state_dir=tmp_path)
    files = TaskFiles(settings, None, publisher())
    with pytest.raises(LayoutError, match="whole model"):
        files.secure_part(task_from_proto(message), message, REGISTRATION)


def whole_task(**changes):
    """A secure task as an honest aggregator gives it, in which what all are told alike has these changes."""
    plan, privacy = {"epochs": 2.0}, {"clip_norm": 1.0}
    vector = SecureVector({"w": (2, 3)}, {"w": 1.0}, 8, 0, 4, seed=b"s")
    about = {"run_id": "r", "round": 1, "model_version": 1, "plan": plan, "privacy": privacy}
    learning = {"learning_task": "package:Task", "model": "cnn", "options": {"depth": "2"}}
    message = secure_task(plan=plan, privacy=privacy)
    terms = common_terms(vector, 2, **{**about, **learning, "model_sha256": bytes(32), **changes})
    message.secure.common = terms.SerializeToString()
    keys = Secrets(b"a" * 32).public
    message.secure.keys.CopyFrom(keys_to_proto(keys))
    message.secure.point = 4
    for point, (name, each) in enumerate(OTHERS.items(), start=1):
        message.secure.neighbours.add(worker=name, point=point, keys=keys_to_proto(each))
    return message


def part_of(tmp_path, message):
    settings = WorkerSettings(name="a", aggregator="127.0.0.1:1", state_dir=tmp_path)
    return TaskFiles(settings, None, publisher()).secure_part(task_from_proto(message), message, REGISTRATION)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"run_id": "other"}, "run of"),
        ({"round": 2}, "round of"),
        ({"model_version": 2}, "model version"),
        ({"plan": {"epochs": 1e-6}}, "training plan"),
        ({"evaluate": True}, "evaluation"),
        ({"privacy": {"clip_norm": 1e-6}}, "privacy"),
        ({"learning_task": "package:Other"}, "learning task"),
        ({"model": "mlp"}, "model of"),
        ({"options": {"depth": "0"}}, "options"),
    ],
)
def test_a_task_that_is_not_what_its_sum_is_of_is_refused(tmp_path, changes, reason):
    assert part_of(tmp_path, whole_task())
    with pytest.raises(UpdateRefused, match=reason):
        part_of(tmp_path, whole_task(**changes))


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ({"epochs": 2.0, "upload_reserve": {"seconds": 1}}, "by the clock"),
        # What former tasks have left on devices could differ between them.
        ({"algorithm": "feddyn"}, "differences alone"),
        ({"algorithm": "scaffold"}, "differences alone"),
    ],
)
def test_plans_by_which_devices_would_differ_are_refused(tmp_path, plan, reason):
    message = whole_task(plan=plan)
    message.plan.CopyFrom(TrainingPlan(**plan))
    with pytest.raises((LayoutError, UpdateRefused), match=reason):
        part_of(tmp_path, message)


async def test_another_model_than_that_of_the_sum_is_refused_before_it_is_trained(tmp_path):
    def held(values):
        payload = io.BytesIO()
        manifest = write_payload({"w": values}, Recipe.parse("int8+zstd"), payload, np.random.default_rng(0))
        folder = tmp_path / str(values[0])
        folder.mkdir()
        (folder / "payload").write_bytes(payload.getvalue())
        header = pb.ModelHeader(version=1, manifest=manifest_to_proto(manifest))
        (folder / "model.pb").write_bytes(StoredModel(run_id="r", header=header).SerializeToString())
        return HeldModel.load(folder)

    right, wrong = (held(np.full(300, value, np.float32)) for value in (1.0, 2.0))
    # Lossy as it travelled: the digest is of what a device trains from.
    part = part_of(tmp_path / "state", whole_task(model_sha256=model_digest(right.each())))
    part.check_model(right)
    with pytest.raises(UpdateRefused, match="not the one that all devices of the sum train"):
        part.check_model(wrong)


async def test_an_unmasked_update_of_a_former_process_is_dropped_by_a_device_that_only_sends_masked_ones(tmp_path):
    def fill(payload, keep):
        manifest = write_payload(UPDATE, Recipe.parse("raw"), payload, np.random.default_rng(0))
        return pb.UpdateHeader(token="t", manifest=manifest_to_proto(manifest)), None

    spool = Spool(tmp_path)
    update = spool.write(pb.Task(token="t", run="r", round=1, kind=TaskKind.TRAIN), fill)
    # There is no client: nothing may be sent.
    delivery = Delivery(None, spool, publisher(), None, None, only_secure=True)
    assert not await delivery.deliver(update, lambda progress: None)
    assert not spool.updates()


@pytest.mark.parametrize("count", [-1, 1025])
def test_absurd_numbers_of_colluding_neighbours_are_refused(tmp_path, count):
    with pytest.raises(UsageError, match="secure_colluding"):
        WorkerSettings(name="a", aggregator="127.0.0.1:1", state_dir=tmp_path, secure_colluding=count)


class NeverReady:
    """An aggregator that answers at once, and never with what belongs to the device."""

    def __init__(self):
        self.asked = 0

    async def exchange(self, *_):
        self.asked += 1
        return Told(False, frozenset(), {})


async def test_an_aggregator_that_is_never_ready_does_not_keep_the_device_busy(tmp_path):
    client, memory = NeverReady(), SecureMemory(tmp_path / "secure")
    circle = Circle(b"s", "a", OTHERS, {name: place for place, name in enumerate("abcd", start=1)}, 2)
    vector = SecureVector({"w": (2, 3)}, {"w": 1.0}, 8, 0, 4)
    part = SecurePart(memory, client, "t", SecureTerms(circle, memory.public_keys(), vector, CommonTerms()))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(part.share(), 1.0)
    assert 1 <= client.asked <= 6
