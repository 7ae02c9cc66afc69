"""How a device is now, read from folders as Linux has them."""

from pathlib import Path

import pytest

from fedgrpc.protocol.devices import DeviceProfile
from fedgrpc.protocol.facts import bounded_conditions, passing_facts
from fedgrpc.v1 import device_pb2
from fedgrpc.worker import conditions
from fedgrpc.worker.conditions import Conditions, OwnersConditions

ROUTES = "Iface Destination Gateway\n{} 0000A8C0 0\n{} 00000000 0101A8C0\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_device_that_tells_nothing_has_its_clock_alone(tmp_path):
    found = Conditions(tmp_path).now()
    assert [field.name for field, _ in found.ListFields()] == ["local_minute"]


@pytest.mark.parametrize(
    ("files", "on_mains"),
    [
        ({"BAT0/type": "Battery", "BAT0/status": "Discharging", "BAT0/capacity": "80"}, False),
        ({"BAT0/type": "Battery", "BAT0/status": "Charging", "BAT0/capacity": "80"}, True),
        ({"AC/type": "Mains", "AC/online": "1", "BAT0/type": "Battery", "BAT0/status": "Discharging"}, True),
        ({"AC/type": "Mains", "AC/online": "0"}, False),
        # The battery of a mouse is none of the device.
        ({"AC/type": "Mains", "AC/online": "1", "hid/type": "Battery", "hid/scope": "Device"}, True),
        ({"other/type": "Wireless"}, True),
    ],
)
def test_power_is_that_of_the_mains_or_of_a_battery(tmp_path, files, on_mains):
    root = write(tmp_path, {f"sys/class/power_supply/{name}": text for name, text in files.items()})
    assert Conditions(root).now().on_mains is on_mains


@pytest.mark.parametrize(
    ("interface", "files", "kind"),
    [
        ("eth0", {"type": "1"}, device_pb2.NETWORK_KIND_ETHERNET),
        ("wlan0", {"type": "1", "wireless/x": ""}, device_pb2.NETWORK_KIND_WIFI),
        ("wwan0", {"type": "65534", "uevent": "DEVTYPE=wwan"}, device_pb2.NETWORK_KIND_CELLULAR),
        ("tun0", {"type": "65534"}, device_pb2.NETWORK_KIND_UNSPECIFIED),
    ],
)
def test_the_network_is_that_of_the_default_route(tmp_path, interface, files, kind):
    folder = f"sys/class/net/{interface}"
    write(tmp_path, {f"{folder}/{name}": text for name, text in files.items()})
    write(tmp_path, {"proc/net/route": ROUTES.format("lo", interface), "sys/class/net/lo/type": "772"})
    assert Conditions(tmp_path).now().network == kind


def test_the_hottest_sensor_counts(tmp_path):
    zones = {f"sys/class/thermal/thermal_zone{n}/temp": text for n, text in enumerate(("41200", "67000", "x"))}
    assert Conditions(write(tmp_path, zones)).now().temperature_celsius == 67.0


def test_the_load_is_what_others_take(tmp_path, monkeypatch):
    monkeypatch.setattr(conditions, "_LEAST_S", 0.0)
    own = "7 (a worker) S " + "0 " * 10 + "{} 0"
    write(tmp_path, {"proc/stat": "cpu 0 0 0 0 0 0 0 0\n", "proc/self/stat": own.format(0)})
    measured = Conditions(tmp_path)
    assert not measured.now().HasField("load")
    # Of 1000 ticks 200 were idle, 500 of this process: others took 300.
    write(tmp_path, {"proc/stat": "cpu 800 0 0 200 0 0 0 0\n", "proc/self/stat": own.format(500)})
    assert measured.now().load == pytest.approx(0.3)


async def test_polls_in_quick_succession_share_a_measurement(tmp_path, monkeypatch):
    def plug(online):
        write(tmp_path, {"sys/class/power_supply/AC/type": "Mains", "sys/class/power_supply/AC/online": online})

    owners, device = OwnersConditions("w", "on_mains", tmp_path), DeviceProfile()
    plug("1")
    assert (await owners.look(device))[1]
    plug("0")
    assert (await owners.look(device))[1]
    monkeypatch.setattr(conditions, "_FRESH_S", 0.0)
    assert not (await owners.look(device))[1]


def test_this_machine_can_be_measured():
    assert Conditions().now().local_minute < 24 * 60


def test_claims_are_bounded_before_they_are_facts():
    said = device_pb2.DeviceConditions(
        on_mains=True, battery=7.0, load=float("nan"), temperature_celsius=1e300, local_minute=9999, network=99
    )
    facts = passing_facts(bounded_conditions(said), 61)
    assert facts == {"on_mains": True, "battery": 1.0, "temperature": 1000.0, "utc_minute": 61.0}


def test_cellular_networks_are_metered():
    wifi = device_pb2.DeviceConditions(network=device_pb2.NETWORK_KIND_WIFI, load=0.1)
    assert passing_facts(wifi, 0) == {
        "network": "wifi",
        "unmetered": True,
        "load": 0.1,
        "idle": True,
        "utc_minute": 0.0,
    }
    assert (
        passing_facts(device_pb2.DeviceConditions(network=device_pb2.NETWORK_KIND_CELLULAR), 0)["unmetered"]
        is False
    )
