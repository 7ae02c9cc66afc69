"""Promise 4: "Nothing accepted is lost. An update is acknowledged once it is durable. `kill -9` the aggregator at
any instant: it restarts into the same round with the same accepted updates."

A real process dies exactly at a named point (tests/faults/points.py) and is started again on what it left behind,
under three devices and an evaluator that go on. The run must end in the same bytes as one that nobody killed.
"""

import asyncio
import shutil
import signal
from contextlib import closing
from dataclasses import dataclass

import pytest
from safetensors.numpy import save_file

from fedgrpc.aggregator.private_releases import KEY_FILE
from fedgrpc.rounds.events import TaskPhase
from fedgrpc.storage.run_store import RunStore
from fedgrpc.storage.uploads import UploadJournal
from fedgrpc.v1 import round_pb2
from tests.faults.points import AGGREGATOR, PRIVATE
from tests.faults.steadfast import FloatsAlone, Judge, Recovery, Steadfast
from tests.faults.tasks import MODEL
from tests.support.hand_driven_device import PATIENCE_S
from tests.support.processes import free_address, running_process

pytestmark = pytest.mark.faults

ROUNDS = 3
NOISE = ("--privacy", "gaussian", "--noise-multiplier", "0.5", "--privacy-cohort", "3", "--clip-norm", "10")
ADAPTIVE = (*NOISE, "--clip-quantile", "0.5")
# One start is killed after another, on one run: for `make test`.
CHAIN = ["register-stored-not-answered", "mid-push", "recovering", "renamed-not-counted", "within-the-transaction"]
TRAINERS = ("a", "b", "c")


@dataclass(frozen=True)
class Kept:
    """What a data folder says of its run.

    `accepted` are the tokens of the open round whose updates are there, `committed` those of each round that is
    over, `tallies` how often each trainer was selected and accepted.
    """

    number: int | None
    accepted: frozenset
    committed: dict
    tallies: dict

    @classmethod
    def in_folder(cls, folder, copy):
        """Looked at in a copy: opening a database writes to it."""
        # The socket of operators is no file that could be copied.
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.sock"))
        store, journal = RunStore(copy / "run.sqlite"), UploadJournal(copy / "uploads")
        try:
            open_round = store.open_round()
            rows = [] if open_round is None else open_round.tasks
            committed = {}
            tallies = {it.worker: (past.selected, past.accepted) for it, past in store.workers()}
            for record in store.rounds(1 << 60, 1000)[0]:
                assert record.phase == round_pb2.ROUND_PHASE_COMMITTED
                done = [row for row in store.tasks(record.number) if row.phase is TaskPhase.ACCEPTED]
                committed[record.number] = frozenset(row.token for row in done)
            return cls(
                None if open_round is None else open_round.record.number,
                frozenset(row.token for row in rows if journal.load(row.token) is not None),
                committed,
                {name: tallies[name] for name in TRAINERS if name in tallies},
            )
        finally:
            store.close()

    @property
    def counted(self):
        return self.accepted.union(*self.committed.values())


@dataclass
class Played:
    """A run that has ended."""

    model: bytes
    optimizer_state: bytes
    kept: Kept
    devices: list
    recovery: Recovery


async def play(folder, rounds, points=(), privacy=()):
    """A whole run; each of `points` kills one start of its aggregator, and the last start runs on to the end."""
    folder.mkdir()
    if privacy:
        # The same noise for all runs that are compared.
        (folder / "run").mkdir()
        (folder / "run" / KEY_FILE).write_bytes(bytes(range(32)))
    # Noise is for floats: a model with an integer is refused.
    kept_floats = {name: array for name, array in MODEL.items() if name != "n" or not privacy}
    save_file(kept_floats, folder / "initial.safetensors")
    address, recovery = free_address(), Recovery()
    devices = [(FloatsAlone if privacy else Steadfast)(address, name, recovery) for name in TRAINERS]
    crew = [device.live(former) for device, former in zip(devices, [None, *devices], strict=False)]
    playing = asyncio.gather(*crew, Judge(address, "judge").live(devices[-1]))
    before = None
    try:
        for number, point in enumerate([*points, None]):
            before = await _start(folder, rounds, address, point, before, number, devices, recovery, privacy)
        await asyncio.wait_for(playing, 2 * PATIENCE_S)
    finally:
        playing.cancel()
    kept = Kept.in_folder(folder / "run", folder / "end")
    last = f"{rounds + 1:06d}.safetensors"
    model, optimizer_state = (folder / "run" / place / last for place in ("models", "optimizer"))
    return Played(model.read_bytes(), optimizer_state.read_bytes(), kept, devices, recovery)


async def _start(folder, rounds, address, point, before, number, devices, recovery, privacy):
    """One start, to its death or to the end of the run; what it leaves behind."""
    program = ("-m", "fedgrpc") if point is None else ("-m", "tests.faults.killed_at", point)
    place = ["--data-dir", folder / "run", "--address", address]
    place += ["--initial-model", folder / "initial.safetensors"]
    rules = ["--rounds", rounds, "--min-workers", 3, "--quorum", 3, "--deadline", "5m", "--lease", "2m"]
    how = ["--server-optimizer", "fedadam", "--download-encoding", "raw+zstd", "--no-evaluate", *privacy]
    async with running_process("aggregator", *place, *rules, *how, program=program) as running:
        code = await running.ended()
        recovery.killed()
        assert code == (0 if point is None else -signal.SIGKILL), str(running.events[-8:])
        if before is not None:
            resumed = [event for event in running.events if event["event"] == "round resumed"]
            expected = [] if before.number is None else [(before.number, len(before.accepted))]
            assert [(event["round"], event["accepted"]) for event in resumed] == expected
    if point is None:
        return None
    after = Kept.in_folder(folder / "run", folder / f"after-{number}")
    assert set().union(*(device.acknowledged for device in devices)) <= after.counted
    if before is not None:
        assert before.counted <= after.counted
    return after


_uninterrupted = {}


async def uninterrupted(tmp_path_factory, rounds, privacy=()):
    """The same run when nobody is killed; played once."""
    if (rounds, privacy) not in _uninterrupted:
        folder = tmp_path_factory.mktemp("uninterrupted") / "run"
        _uninterrupted[rounds, privacy] = await play(folder, rounds, privacy=privacy)
    return _uninterrupted[rounds, privacy]


def nothing_lost_and_nothing_twice(played, rounds, expected):
    assert played.model == expected.model
    assert played.optimizer_state == expected.optimizer_state
    assert sorted(played.kept.committed) == list(range(1, rounds + 1))
    for number in range(1, rounds + 1):
        given = [device.tokens[number] for device in played.devices]
        # Each device was asked once in each round: a restart gave the same task again, and its update counts once.
        assert [len(tokens) for tokens in given] == [1] * len(TRAINERS)
        assert played.kept.committed[number] == frozenset().union(*given)
    assert played.kept.tallies == dict.fromkeys(TRAINERS, (rounds, rounds))


@pytest.mark.parametrize("point", AGGREGATOR)
async def test_an_aggregator_killed_at_this_point_goes_on_as_if_it_had_not_been(
    tmp_path, tmp_path_factory, point, recovery_of
):
    points = ["mid-push", point] if point == "recovering" else [point]
    expected = await uninterrupted(tmp_path_factory, ROUNDS)
    played = await play(tmp_path / "killed", ROUNDS, points)
    nothing_lost_and_nothing_twice(played, ROUNDS, expected)
    recovery_of(f"aggregator killed: {point}", played.recovery.took_s[-1])


@pytest.mark.parametrize("noise", [NOISE, ADAPTIVE], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("point", PRIVATE)
async def test_an_aggregator_killed_around_a_release_draws_the_same_noise_and_enters_it_once(
    tmp_path, tmp_path_factory, point, noise
):
    # The model of an adaptive clip norm is the same only if each round had the same norm.
    expected = await uninterrupted(tmp_path_factory, ROUNDS, noise)
    played = await play(tmp_path / "killed", ROUNDS, [point], noise)
    nothing_lost_and_nothing_twice(played, ROUNDS, expected)
    with closing(RunStore(tmp_path / "killed" / "run" / "run.sqlite", read_only=True)) as store:
        entered = store.releases()
    assert [(each.step, each.round, each.version, each.count) for each in entered] == [
        (number, number, number + 1, len(TRAINERS)) for number in range(1, ROUNDS + 1)
    ]


async def test_an_aggregator_killed_again_and_again_ends_as_one_that_was_not(tmp_path, tmp_path_factory):
    rounds = 8
    expected = await uninterrupted(tmp_path_factory, rounds)
    played = await play(tmp_path / "killed", rounds, CHAIN)
    nothing_lost_and_nothing_twice(played, rounds, expected)
