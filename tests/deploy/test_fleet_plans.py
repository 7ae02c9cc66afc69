"""The fleet of `make fleet`: ten devices, ten local models."""

from pathlib import Path

from fedgrpc.submodels.plan_table import PlanTable
from tools.container_fleet import PLANS
from tools.containers.devices import make_fleet


def test_each_device_of_the_fleet_has_a_local_model_of_its_own() -> None:
    table = PlanTable.from_toml(Path(PLANS).read_text(encoding="utf-8"))
    names = {device.name for device in make_fleet(2)}
    assert table.classes.keys() == names
    assert len({table.plan_of(name).to_line() for name in names}) == len(names) == 10
