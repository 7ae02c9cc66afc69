"""Secure sums of devices with certificates: an aggregator that swaps or makes up neighbours gets no update."""

import asyncio
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedgrpc.aggregator import task_terms
from fedgrpc.errors import UsageError
from fedgrpc.identity.certificates import Authority, key_pem, make_key, pem_of
from fedgrpc.identity.folder import DeviceFolder
from fedgrpc.identity.roles import Role
from fedgrpc.identity.signed_keys import KeySigner
from fedgrpc.privacy.one_time_keys import Secrets
from fedgrpc.privacy.secure_policy import SecurePolicy
from fedgrpc.protocol.secure import keys_to_proto, secure_task_to_proto
from fedgrpc.rpc.channel import Tls
from fedgrpc.v1 import round_pb2
from fedgrpc.worker.certified_keys import CertifiedKeys
from fedgrpc.worker.settings import WorkerSettings
from tests.support.certificates import make_authority, make_certificate
from tests.support.hand_driven_device import PATIENCE_S
from tests.support.joining import OUTSIDE, new_token, revoke
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker

SECURE = {"secure": SecurePolicy(secure_bits=8), "clip_norm": 10.0, **OUTSIDE}
MODEL = {"w": np.zeros(301, np.float32)}


def secure_aggregator(tmp_path, count=3, **policy):
    save_file(MODEL, tmp_path / "initial.safetensors")
    return running_aggregator(tmp_path, **SECURE, policy={"min_workers": count, "quorum": 3, **policy})


async def start_joined(running, tmp_path, *names, **changes):
    """Workers that join with a token, take part in nothing but secure sums, and show whom they are with."""
    workers = {}
    for name in names:
        token = await new_token(running, names=name)
        trainer = ShiftTrainer(0.1, weights=MODEL)
        workers[name] = start_worker(running, tmp_path, name, trainer, join=token, only_secure=True, **changes)
    return workers


async def until(condition):
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.05)


async def ended(workers):
    for worker in workers.values():
        worker.cancel()
    await asyncio.gather(*workers.values(), return_exceptions=True)


async def test_devices_of_one_authority_sum_under_signed_keys(tmp_path):
    async with secure_aggregator(tmp_path) as running:
        workers = await start_joined(running, tmp_path, "w0", "w1", "w2")
        await running.until_finished()
        (round_,) = await running.rounds()
        weights = running.weights(2)["w"]
        await ended(workers)
    assert round_.phase == round_pb2.ROUND_PHASE_COMMITTED, round_.reason
    # Within a step of the grid: 255 of them reach from minus the bound to the bound.
    np.testing.assert_allclose(weights, 0.1, atol=2 * 10 / 255)


def made_up(tmp_path, name, run_id):
    """Keys of a device that there is not, signed under the aggregator's own made-up authority."""
    key = make_key()
    certificate = Authority.make().issue_member(key.public_key(), Role.TRAINER, name, 4e9)
    (tmp_path / "made.pem").write_bytes(pem_of(certificate))
    (tmp_path / "made.key").write_bytes(key_pem(key))
    return signed(tmp_path / "made.pem", tmp_path / "made.key", name, run_id)


def of_device(tmp_path, device, name, run_id):
    """Keys that a device of the fleet has signed, in this name."""
    files = DeviceFolder(tmp_path / device / "identity")
    return signed(files.certificate, files.key, name, run_id)


def signed(certificate, key, name, run_id):
    return KeySigner(certificate, key).signed(run_id, name, Secrets(b"m" * 32).public, time.time())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("unsigned", "not signed"),
        ("other authority", "no authority that is trusted"),
        ("other device", "certificate of the trainer"),
        ("other run", "another run"),
    ],
)
async def test_a_device_gives_a_task_back_whose_neighbour_the_aggregator_has_made_up(
    tmp_path, monkeypatch, kind, reason
):
    """Here it has no authority that its devices trust."""

    def swapped(sum_, worker):
        message = secure_task_to_proto(sum_, worker)
        victim, other = message.neighbours[0], message.neighbours[1]
        if kind == "unsigned":
            victim.keys.CopyFrom(keys_to_proto(Secrets(b"m" * 32).public))
        elif kind == "other authority":
            victim.keys.CopyFrom(keys_to_proto(made_up(tmp_path, victim.worker, "whatever")))
        elif kind == "other device":
            victim.keys.CopyFrom(keys_to_proto(of_device(tmp_path, other.worker, victim.worker, "whatever")))
        else:
            victim.keys.CopyFrom(keys_to_proto(of_device(tmp_path, victim.worker, victim.worker, "another")))
        return message

    monkeypatch.setattr(task_terms, "secure_task_to_proto", swapped)
    async with secure_aggregator(tmp_path) as running:
        workers = await start_joined(running, tmp_path, "w0", "w1", "w2")
        tasks = [await running.until_task(name, round_pb2.TASK_PHASE_FAILED) for name in workers]
        assert not running.kept_updates()
        await ended(workers)
    for task in tasks:
        assert reason in task.reason
        assert "one-time keys of" in task.reason


async def test_devices_with_certificates_of_the_operators_own_authority_sum_too(tmp_path):
    pki = tmp_path / "pki"
    make_authority(pki)
    make_certificate(pki, "aggregator")
    save_file(MODEL, tmp_path / "initial.safetensors")
    policy = {"min_workers": 3, "quorum": 3}
    async with running_aggregator(
        tmp_path, **{**SECURE, "tls": tls_of(pki, "aggregator")}, policy=policy
    ) as running:
        workers = {}
        for name in ("w0", "w1", "w2"):
            make_certificate(pki, name, "trainer")
            workers[name] = start_worker(
                *(running, tmp_path, name, ShiftTrainer(0.1, weights=MODEL)),
                tls=tls_of(pki, name),
                only_secure=True,
            )
        await running.until_finished()
        (round_,) = await running.rounds()
        await ended(workers)
    assert round_.phase == round_pb2.ROUND_PHASE_COMMITTED, round_.reason


def tls_of(pki, name):
    return Tls(pki / "ca.pem", pki / f"{name}.pem", pki / f"{name}.key")


async def test_a_device_that_only_adds_to_secure_sums_gives_a_plain_task_back(tmp_path):
    async with running_aggregator(tmp_path, policy={"min_workers": 1}, **OUTSIDE) as running:
        workers = await start_joined(running, tmp_path, "w0")
        task = await running.until_task("w0", round_pb2.TASK_PHASE_FAILED)
        await ended(workers)
    assert "--only-secure" in task.reason


async def test_a_device_with_a_wrong_clock_is_left_out_and_the_others_have_their_sum(tmp_path, monkeypatch):
    signed = CertifiedKeys.signed

    def with_its_clock(certified, run_id, keys):
        if certified._worker != "late":
            return signed(certified, run_id, keys)
        return certified._signer.signed(run_id, "late", keys, 1000.0)

    monkeypatch.setattr(CertifiedKeys, "signed", with_its_clock)
    async with secure_aggregator(tmp_path) as running:
        workers = await start_joined(running, tmp_path, "late", "w0", "w1")
        polling = running.aggregator.coordinator.fleet
        await until(lambda: {each.name for each in polling if each.polls} >= workers.keys())
        workers |= await start_joined(running, tmp_path, "w2")
        await running.until_finished()
        (round_,) = await running.rounds()
        await ended(workers)
    assert round_.phase == round_pb2.ROUND_PHASE_COMMITTED, round_.reason
    assert {task.worker for task in round_.tasks} == {"w0", "w1", "w2"}


async def test_a_revoked_device_has_no_keys_for_a_sum_any_more(tmp_path):
    async with secure_aggregator(tmp_path, count=4) as running:
        workers = await start_joined(running, tmp_path, "w0", "w1", "w2")
        keys = running.aggregator.coordinator.machine.keys
        await until(lambda: keys.keys() == {"w0", "w1", "w2"})
        await revoke(running, "w1")
        await until(lambda: keys.keys() == {"w0", "w2"})
        await ended(workers)


@pytest.mark.parametrize(
    ("tls", "more", "reason"),
    [
        (None, {"only_secure": True}, "need a certificate"),
        (None, {"secure_ca": "ca.pem"}, "need a certificate"),
        ({"ca": "ca.pem"}, {"only_secure": True}, "need a certificate"),
        ({"certificate": "c.pem", "key": "k.pem"}, {"only_secure": True}, "secure_ca or tls_ca"),
    ],
)
def test_a_promise_that_no_certificate_backs_is_refused_at_the_start(tmp_path, tls, more, reason):
    more = {name: tmp_path / value if isinstance(value, str) else value for name, value in more.items()}
    files = None if tls is None else Tls(**{name: tmp_path / value for name, value in tls.items()})
    with pytest.raises(UsageError, match=reason):
        CertifiedKeys.of(WorkerSettings("w", "127.0.0.1:1", tmp_path, tls=files, **more))
    assert CertifiedKeys.of(WorkerSettings("w", "127.0.0.1:1", tmp_path)) is None
