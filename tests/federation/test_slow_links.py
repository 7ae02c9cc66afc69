"""Links so slow that a chunk of the usual size would outlast the lease: chunks fit them, and what came is kept."""

import asyncio

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support.hand_driven_device import PATIENCE_S
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker
from tests.support.unreliable_link import UnreliableLink

TENSORS = {"w": np.random.default_rng(1).normal(size=40_000).astype(np.float32)}
SIZE_BYTES = TENSORS["w"].nbytes


@pytest.mark.parametrize("bytes_per_s", [40_000, 80_000])
@pytest.mark.faults
async def test_a_round_is_done_over_a_link_that_carries_less_than_an_update_in_a_lease(tmp_path, bytes_per_s):
    save_file(TENSORS, tmp_path / "initial.safetensors")
    policy = {"min_workers": 1, "lease_s": 1.0, "deadline_s": PATIENCE_S}
    how = {"download_recipe": "raw", "upload_recipe": "raw", "heartbeat_interval_s": 0.3}
    initial = tmp_path / "initial.safetensors"
    async with (
        running_aggregator(tmp_path, policy=policy, initial_model=initial, rounds=1, **how) as running,
        UnreliableLink(running.address, bytes_per_s=bytes_per_s) as link,
    ):
        worker = start_worker(link.address, tmp_path, "pi", ShiftTrainer(weights=TENSORS))
        await running.until_finished()
        assert await asyncio.wait_for(worker, PATIENCE_S) == 0
        np.testing.assert_allclose(running.weights(2)["w"], TENSORS["w"] + 1, rtol=1e-5)
        # What has arrived is not sent again and again.
        assert link.up_bytes < 1.6 * SIZE_BYTES
        assert link.down_bytes < 1.6 * SIZE_BYTES
