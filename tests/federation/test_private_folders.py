"""What processes write is for their user alone: updates of single devices, tokens, models, residuals."""

import stat

from tests.support.processes import aggregator_process, worker_process
from tests.support.running_federation import running_aggregator


def readable_by_others(folder):
    """Paths below `folder`, and itself, that anybody but the owner may read, write or enter."""
    return [path for path in (folder, *folder.rglob("*")) if path.lstat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)]


async def test_whatever_the_processes_write_is_for_their_user_alone(tmp_path):
    data = tmp_path / "data"
    async with aggregator_process(tmp_path, "--rounds", 2, "--min-workers", 1) as (_, running):
        async with worker_process(running, tmp_path, "pi", data) as worker:
            await running.until_finished()
            assert await worker.ended() == 0
        for folder in (running.settings.data_dir, tmp_path / "pi"):
            assert len(list(folder.rglob("*"))) > 3
            assert readable_by_others(folder) == []


async def test_folders_are_private_whatever_the_umask_of_the_process_that_makes_them(tmp_path):
    async with running_aggregator(tmp_path) as running:
        device = await running.device("a")
        await device.pull(version=1)
        for name in (".", "models", "encoded", "delta-bases", "uploads", "uploads/recycled"):
            folder = running.settings.data_dir / name
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
