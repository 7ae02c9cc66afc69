"""The Ray engine, where Ray is installed (`fedgrpc[ray]`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.simulation.test_learning import _experiment, _play, _told

pytestmark = pytest.mark.extras


def test_actors_of_ray_make_the_bytes_of_an_inline_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    experiment = _experiment(rounds=3)
    inline = _play(experiment, tmp_path / "inline")
    assert _told(_play(experiment, tmp_path / "ray", "ray", 2)) == _told(inline)
