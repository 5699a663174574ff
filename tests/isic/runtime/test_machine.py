"""The machine as control groups and CUDA's driver limit it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from isic.runtime import machine
from isic.runtime.machine import available_memory, cores, cpu_quota, gpus, no_gpu_reason, num_cores
from tests.support import fake_driver

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
V1 = "34 32 0:30 {mounted} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
HYBRID = "40 32 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"


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


MEMINFO = {"proc/meminfo": "MemTotal: 64 kB\nMemAvailable: 32 kB\nHugePages_Total: 0\n"}


def test_available_memory_is_the_least_of_the_machine_and_the_groups(tmp_path: Path) -> None:
    base = "sys/fs/cgroup"
    files = {
        f"{base}/pod/memory.max": "20000\n",
        f"{base}/pod/memory.current": "15000\n",
        f"{base}/pod/memory.stat": "anon 9000\ninactive_file 4000\n",
        f"{base}/pod/job/memory.max": "max\n",
        f"{base}/pod/job/memory.current": "1000\n",
        f"{base}/pod/job/memory.stat": "anon 1000\n",
    }
    assert available_memory(system(tmp_path, "0::/pod/job\n", V2, **files, **MEMINFO)) == 9000
    assert available_memory(system(tmp_path, "0::/\n", V2, **MEMINFO)) == 32 * 1024
    assert available_memory(tmp_path / "no linux") is None


def test_available_memory_of_version_1(tmp_path: Path) -> None:
    mounts = V1.format(mounted="/").replace("cpu,cpuacct", "memory")
    files = {
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "7000\n",
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "6000\n",
        "sys/fs/cgroup/memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 500\n",
    }
    assert available_memory(system(tmp_path, "8:memory:/job\n", mounts, **files, **MEMINFO)) == 1500


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
    hidden = f'CUDA_VISIBLE_DEVICES="{visible}" hides every GPU; run `unset CUDA_VISIBLE_DEVICES`'
    expected = hidden if visible in {"", "-1"} else "no device"
    assert no_gpu_reason() == (None if names else expected)


def ask(code: str, environment: dict[str, str]) -> str:
    """Return what an expression of `machine` is in a process of its own."""
    command = [sys.executable, "-c", f"from isic.runtime import machine; print({code})"]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_driver_is_asked(tmp_path: Path) -> None:
    works = fake_driver.install(tmp_path, count=2)
    assert ask("machine.gpus(), machine.no_gpu_reason()", works) == "['0', '1'] None"
    assert ask("machine.gpu_names()[1]", works) == "NVIDIA Fake, compute capability 8.9"
    assert ask("machine.gpu_architecture()", works) == "sm89"
    assert ask("machine.driver_cuda()", works) == "12.6"
    assert ask("machine.nvidia_driver()", works) == "560.35.03"


def test_an_error_of_the_driver_has_its_fix(tmp_path: Path) -> None:
    fails = fake_driver.install(tmp_path, count=2, status=802)
    assert ask("machine.gpus()", fails) == "[]"
    assert ask("machine.no_gpu_reason()", fails) == (
        "no NVIDIA GPU can be used (CUDA: system not yet initialized); "
        "start the service nvidia-fabricmanager"
    )


def test_a_driver_that_does_not_load_is_not_a_machine_without_a_gpu(tmp_path: Path) -> None:
    broken = fake_driver.install_broken(tmp_path)
    reason = ask("machine.no_gpu_reason()", broken)
    assert reason.startswith("NVIDIA's driver does not load (")
    assert reason.endswith("libcuda.so.1: file too short); " + machine.REPAIR_DRIVER)
    assert ask("machine.gpu_names(), machine.driver_cuda()", broken) == "[] None"
    assert ask("machine.gpu_architecture()", broken) == "None"


MISSING = OSError("libcuda.so.1: cannot open shared object file: No such file or directory")
DEPENDENCY = OSError("libfoo.so: cannot open shared object file: No such file or directory")


@pytest.mark.parametrize(
    ("error", "files", "containers", "words"),
    [
        (MISSING, (), (), "this machine has no NVIDIA GPU; use one that has"),
        (MISSING, (), ("/proc/self",), "this container has no NVIDIA GPU; .*`--gpus all`"),
        (MISSING, ("/proc/self",), (), "driver is not installed .*; install NVIDIA's driver"),
        (FileNotFoundError("nvcuda.dll"), (), (), "this machine has no NVIDIA GPU"),
        (DEPENDENCY, (), (), "driver does not load .*; restart the machine"),
    ],
)
def test_a_missing_driver_is_explained(
    error: OSError,
    files: tuple[str, ...],
    containers: tuple[str, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "GPU_FILES", files)
    monkeypatch.setattr(machine, "CONTAINER_FILES", containers)
    assert re.search(words, machine._no_driver_reason(error))


@pytest.mark.parametrize(
    ("built_for", "found", "is_old"),
    [
        ("13.0", "12.6", True),
        ("13.5", "13.0", False),
        ("12.8", "13.0", False),
        ("12.8", None, False),
        (None, "12.6", False),
    ],
)
def test_a_driver_runs_its_own_major_version_of_cuda_and_older_ones(
    built_for: str | None, found: str | None, is_old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "driver_cuda", lambda: found)
    assert (machine.old_driver_reason("a library", built_for) is not None) == is_old


def test_the_driver_for_a_version_of_cuda() -> None:
    assert machine.driver_for("13.5") == "NVIDIA driver 580 or newer"
    assert machine.driver_for("99.0") == "a newer NVIDIA driver"


def test_the_kernel_module_names_the_driver(tmp_path: Path) -> None:
    """The two texts are those of NVIDIA's proprietary and of its open kernel module."""
    path = tmp_path / "version"
    for kind in ("x86_64 Kernel Module", "Open Kernel Module for x86_64"):
        path.write_text(f"NVRM version: NVIDIA UNIX {kind}  580.65.06  Sun Jul 27 2025\n")
        assert machine.nvidia_driver(path) == "580.65.06"


def test_a_machine_without_a_gpu_has_none_whatever_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if machine.has_gpu():
        pytest.skip("this machine has a GPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert gpus() == []
    assert "no NVIDIA GPU" in str(no_gpu_reason())
