import os
import subprocess
import sys

import psutil
import pytest

from fedgrpc.errors import UsageError
from fedgrpc.protocol.devices import DeviceProfile, profile_to_proto
from fedgrpc.v1 import device_pb2
from fedgrpc.worker.device import detect, device_class_of, usual_threads


def machine(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_this_machine_is_recognized():
    profile = detect()
    assert profile.cpu_model
    assert 1 <= profile.cpu_cores <= os.cpu_count()
    assert 0 < profile.memory_bytes <= psutil.virtual_memory().total


def test_a_containers_limits_count_not_its_hosts_machine(tmp_path):
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/worker\n",
            "sys/fs/cgroup/pod/memory.max": "1073741824\n",
            "sys/fs/cgroup/pod/worker/memory.max": "max\n",
            "sys/fs/cgroup/pod/worker/cpu.max": "50000 100000\n",
        },
    )
    profile = detect(root)
    assert profile.memory_bytes == 1 << 30
    assert profile.cpu_cores == 1


def test_limits_of_the_first_cgroup_version_count_too(tmp_path):
    root = machine(
        tmp_path,
        {
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "536870912\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert (detect(root).memory_bytes, detect(root).cpu_cores) == (1 << 29, 1)


def test_a_container_of_less_than_all_cores_trains_with_no_more_threads(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    root = machine(tmp_path, {"sys/fs/cgroup/cpu.max": "250000 100000"})
    assert usual_threads(root) == 3
    assert usual_threads(tmp_path / "no container") is None
    # What the user has set counts.
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert usual_threads(root) is None


def test_no_limit_and_no_proc_are_no_error(tmp_path):
    profile = detect(machine(tmp_path, {"sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/cpu.max": "max 100000"}))
    assert profile.memory_bytes == psutil.virtual_memory().total
    assert detect(tmp_path / "nothing").cpu_cores >= 1


def test_the_device_tree_names_the_board(tmp_path):
    root = machine(tmp_path, {"proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0"})
    assert detect(root).cpu_model == "Raspberry Pi 4 Model B Rev 1.4"
    assert detect(root).device_class == "raspberry-pi-4"


@pytest.mark.parametrize(
    ("board", "device_class"),
    [
        ("NVIDIA Jetson Nano Developer Kit", "jetson-nano"),
        ("NVIDIA Jetson Nano 2GB Developer Kit", "jetson-nano-2gb"),
        ("NVIDIA Jetson AGX Orin Developer Kit", "jetson-agx-orin"),
        ("Raspberry Pi Zero 2 W Rev 1.0", "raspberry-pi-zero-2-w"),
        ("", ""),
    ],
)
def test_a_device_class_is_read_from_the_boards_name(board, device_class):
    assert device_class_of(board) == device_class


def test_the_operator_has_the_last_word():
    profile = detect().with_overrides({"device_class": "camera", "memory_bytes": 5, "on_battery": True})
    assert (profile.device_class, profile.memory_bytes, profile.on_battery) == ("camera", 5, True)


@pytest.mark.parametrize("bad", [{"colour": "red"}, {"memory_bytes": "1G"}, {"cpu_cores": -1}, {"on_battery": 1}])
def test_an_override_that_does_not_fit_is_a_usage_error(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        DeviceProfile().with_overrides(bad)


def test_every_field_travels():
    profile = detect().with_overrides({"uplink_bits_per_second": 7, "accelerator": "cuda"})
    message = device_pb2.DeviceProfile.FromString(profile_to_proto(profile).SerializeToString())
    assert {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields} == vars(profile)


def test_neither_the_worker_nor_its_profile_import_torch():
    code = (
        "import sys, fedgrpc.worker.process as run; run.detect();"
        "sys.exit(sum(name == 'torch' or name.startswith('torch.') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
