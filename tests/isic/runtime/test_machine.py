"""The machine as control groups and CUDA's driver limit it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from isic.runtime import machine
from isic.runtime.machine import cores, cpu_quota, gpus, no_gpu_reason, num_cores

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
V1 = "34 32 0:30 {mounted} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
HYBRID = "40 32 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
FAKE_DRIVER = """
#include <stdlib.h>
int cuInit(unsigned flags) { return atoi(getenv("FAKE_STATUS")); }
int cuDeviceGetCount(int *count) { *count = atoi(getenv("FAKE_COUNT")); return 0; }
int cuGetErrorString(int status, const char **text) { *text = "system not yet initialized"; return 0; }
"""


def system(root: Path, groups: str, mounts: str, **files: str) -> Path:
    """A root folder with the files of /proc and of control groups."""
    texts = {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts, **files}
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v1(folder: str, quota: int, period: int = 100000) -> dict[str, str]:
    path = f"sys/fs/cgroup/cpu,cpuacct/{folder}"
    return {f"{path}/cpu.cfs_quota_us": f"{quota}\n", f"{path}/cpu.cfs_period_us": f"{period}\n"}


def test_the_quota_of_version_2_is_the_least_of_the_group_and_those_around_it(
    tmp_path: Path,
) -> None:
    base = "sys/fs/cgroup"
    files = {
        f"{base}/pod/cpu.max": "150000 100000\n",
        f"{base}/pod/job/cpu.max": "max 100000\n",
        f"{base}/pod/job/step/cpu.max": "200000 100000\n",
    }
    assert cpu_quota(system(tmp_path, "0::/pod/job/step\n", V2, **files)) == 1.5


def test_a_container_sees_its_group_as_the_root(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/cpu.max": "50000 100000\n"}
    assert cpu_quota(system(tmp_path, "0::/\n", V2, **files)) == 0.5


def test_version_1_with_the_path_of_the_host_and_beside_version_2(tmp_path: Path) -> None:
    groups = "4:cpu,cpuacct:/docker/ab12/job\n1:name=systemd:/docker/ab12\n0::/docker/ab12\n"
    mounts = HYBRID + V1.format(mounted="/docker/ab12")
    files = {**v1("", 400000), **v1("job", 250000)}
    assert cpu_quota(system(tmp_path, groups, mounts, **files)) == 2.5


@pytest.mark.parametrize(
    ("groups", "mounts", "files"),
    [
        ("0::/\n", V2, {}),
        ("0::/a\n", V2, {"sys/fs/cgroup/a/cpu.max": "max 100000\n"}),
        ("4:cpu,cpuacct:/\n", V1.format(mounted="/"), v1("", -1)),
        ("4:memory:/\n", V1.format(mounted="/"), v1("", 100000)),
    ],
)
def test_no_limit_is_none(groups: str, mounts: str, files: dict[str, str], tmp_path: Path) -> None:
    assert cpu_quota(system(tmp_path, groups, mounts, **files)) is None
    assert cpu_quota(tmp_path / "no linux") is None


@pytest.mark.parametrize(("quota", "number"), [(None, 8), (0.2, 1), (1.5, 2), (3.0, 3), (64.0, 8)])
def test_threads_follow_the_quota_and_affinity_does_not(
    quota: float | None, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: [*range(8)])
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    assert num_cores() == number


def test_a_real_control_group() -> None:
    """A process in a group of half a CPU uses one thread, and may still run on every core."""
    parent = (
        Path("/sys/fs/cgroup/cpu")
        if Path("/sys/fs/cgroup/cpu").is_dir()
        else Path("/sys/fs/cgroup")
    )
    group = parent / f"isic-test-{os.getpid()}"
    try:
        group.mkdir()
        limit = group / "cpu.cfs_quota_us"
        if limit.exists():
            limit.write_text("50000")
        else:
            (group / "cpu.max").write_text("50000 100000")
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"this user may not limit a control group ({error})")
    code = "from isic.runtime.machine import cores, num_cores; print(num_cores(), len(cores()))"
    script = f'echo $$ > {group}/cgroup.procs && exec "{sys.executable}" -c "{code}"'
    ended = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    group.rmdir()
    assert ended.stdout.split() == ["1", str(len(cores()))], ended.stderr


@pytest.mark.parametrize(
    ("visible", "count", "names"),
    [
        (None, 2, ["0", "1"]),
        ("4,7", 2, ["4", "7"]),
        ("1,-1,0", 1, ["1"]),
        (" 1, 0", 2, ["1", "0"]),
        ("GPU-8f6a,GPU-1b2c", 2, ["GPU-8f6a", "GPU-1b2c"]),
        ("MIG-41c7", 1, ["MIG-41c7"]),
        ("-1", 0, []),
        ("", 0, []),
        ("0,0", 0, []),
    ],
)
def test_cuda_counts_and_the_variable_names(
    visible: str | None, count: int, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(machine, "_ask_cuda", lambda: (count, "no device"))
    monkeypatch.setattr(machine, "GPU_FILES", ("/proc/self",))
    assert gpus() == names
    hidden = f'CUDA_VISIBLE_DEVICES="{visible}" hides every GPU'
    expected = hidden if visible in {"", "-1"} else "no device"
    assert no_gpu_reason() == (None if names else expected)


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_the_driver_is_asked(tmp_path: Path) -> None:
    """With a fake libcuda.so.1, which this machine need not have."""
    (tmp_path / "driver.c").write_text(FAKE_DRIVER)
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "driver.c"], check=True)
    code = "from isic.runtime.machine import gpus, no_gpu_reason; print(gpus(), no_gpu_reason())"

    def ask(count: int, status: int) -> str:
        fake = {
            "LD_LIBRARY_PATH": str(tmp_path),
            "FAKE_COUNT": str(count),
            "FAKE_STATUS": str(status),
        }
        environment = {
            key: text for key, text in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"
        }
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, env=environment | fake, capture_output=True, text=True, check=True
        ).stdout

    assert ask(2, 0) == "['0', '1'] None\n"
    assert ask(2, 802) == "[] no NVIDIA GPU can be used (CUDA: system not yet initialized)\n"


def test_a_machine_without_a_gpu_has_none_whatever_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if machine.has_gpu():
        pytest.skip("this machine has a GPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert gpus() == []
    assert "no NVIDIA GPU" in str(no_gpu_reason())
