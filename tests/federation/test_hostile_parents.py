"""A parent that tells a leaf numbers that cannot be: the leaf gives its task back, and lives."""

import asyncio
import math

import pytest

from fedgrpc.aggregator.task_terms import TrainingInstructions
from fedgrpc.v1 import round_pb2
from tests.federation.test_secure_leaves import SECURE, Drawn, placed, tree
from tests.support.running_federation import start_worker


@pytest.mark.parametrize("clip_norm", [math.nan, -1.0])
async def test_a_leaf_gives_a_task_with_a_clip_norm_that_cannot_be_back_and_does_the_next(
    tmp_path, monkeypatch, clip_norm
):
    for_leaf, told = TrainingInstructions.for_leaf, []

    def spoiled(instructions, *about):
        leaf = for_leaf(instructions, *about)
        if len(told) < 1:
            leaf.clip_norm = clip_norm
        told.append(leaf.clip_norm)
        return leaf

    monkeypatch.setattr(TrainingInstructions, "for_leaf", spoiled)
    places = placed(a=3)
    async with tree(tmp_path / "tree", places, **SECURE) as running:
        workers = [
            start_worker(running[place], tmp_path / "tree", *each)
            for place, each in zip(places.values(), ((name, Drawn(0.1)) for name in places), strict=True)
        ]
        await running[()].until_finished()
        assert await asyncio.gather(*workers) == [0] * 3
        rounds = await running[()].rounds()
    first = [task for task in rounds[0].tasks if task.phase == round_pb2.TASK_PHASE_FAILED]
    assert "the clip norm" in first[0].reason
    assert rounds[-1].tasks[-1].merged_updates == 3
