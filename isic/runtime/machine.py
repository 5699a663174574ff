"""Cores, GPUs and memory of this machine as this process may use them."""

import ctypes
import math
import os
import platform
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
CUDA_DRIVER = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
GPU_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/usr/lib/wsl/lib/libcuda.so.1")
"""Files that only a machine with an NVIDIA GPU has; WSL2 has none of NVIDIA's devices in /dev."""

COMPILED = re.compile(
    "abm|adx|aes|amx|asimd|atomics|avx|bf16|bmi|f16c|fma|fphp|gfni|i8mm|movbe|pclmul|popcnt|sha|"
    "sse|ssse|sve|tbm|vaes|vpclmul|xop"
)
"""Beginnings of the names of instructions that compilers use, by Linux on x86 and ARM."""


def cores() -> list[int]:
    """Return the numbers of the cores that this process may run on, for `sched_setaffinity`."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def num_cores() -> int:
    """Return the number of threads that this process can keep busy.

    It is the number of cores that it may run on or, if that is less, the CPU time that its control
    groups allow it, rounded up: `docker run --cpus 2` leaves every core visible.
    """
    quota = cpu_quota()
    return len(cores()) if quota is None else max(1, min(len(cores()), math.ceil(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return how many cores' time control groups (v1 or v2) allow this process, None if unlimited.

    Args:
        root: folder in which /proc and the control groups' file systems are found.
    """
    limits = [_cpu_limit(folder) for folder in _cpu_control_groups(root)]
    return min((limit for limit in limits if limit is not None), default=None)


def _cpu_control_groups(root: Path) -> Iterator[Path]:
    """Yield the folders of this process's control groups for CPU time and of their parents.

    See cgroups(7) for /proc/self/cgroup and proc(5) for /proc/self/mountinfo. Version 2 has one
    hierarchy, listed without a controller's name.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        mounts = (root / "proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    paths: dict[str, PurePosixPath] = {}
    for group in groups:
        _, controllers, path = group.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), PurePosixPath(path))
    for mount in mounts:
        before, _, after = mount.partition(" - ")
        kind, _, options = after.split()[:3]
        controller = {"cgroup2": "", "cgroup": "cpu"}.get(kind)
        if controller not in paths or (controller and controller not in options.split(",")):
            continue
        mounted, point = before.split()[3:5]  # a container may see only a part of the hierarchy
        own = paths[controller]
        inside = own.relative_to(mounted) if own.is_relative_to(mounted) else PurePosixPath()
        yield from (root / point.lstrip("/") / folder for folder in (inside, *inside.parents))


def _cpu_limit(folder: Path) -> float | None:
    """Return how many cores' time one control group allows, None if unlimited."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = ((folder / name).read_text(encoding="utf-8").strip() for name in names)
    except OSError:  # the root of a hierarchy has no limits, and other mounts may hide the folder
        return None
    return None if quota in {"max", "-1"} else int(quota) / int(period)


def cpu_features() -> list[str]:
    """Return the CPU's instructions that compilers use, by Linux's names; on other systems none."""
    lines = _lines("/proc/cpuinfo")
    flags = next((line for line in lines if re.match(r"(flags|Features)\s*:", line)), ":")
    return sorted(name for name in flags.split(":", 1)[1].split() if COMPILED.match(name))


def processor() -> str:
    """Return the processor's name, family and model; virtual machines shorten the name."""
    pairs = [line.split(":", 1) for line in reversed(_lines("/proc/cpuinfo")) if ":" in line]
    facts = {key.strip(): value.strip() for key, value in pairs}
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    numbers = [f"{key} {facts[key]}" for key in ("cpu family", "model") if key in facts]
    return facts["model name"] + (f" ({', '.join(numbers)})" if numbers else "")


def gpus() -> list[str]:
    """Return the GPUs that CUDA lets this process use, as CUDA_VISIBLE_DEVICES names them.

    CUDA counts them itself: it reads the variable up to the first entry that is not a GPU.
    """
    number, _ = _ask_cuda()
    named = os.environ.get(VISIBLE_GPUS)
    names = [*map(str, range(number))] if named is None else [*map(str.strip, named.split(","))]
    return names[:number]


def no_gpu_reason() -> str | None:
    """Return why CUDA can use no GPU in this process, None if it can use one."""
    number, reason = _ask_cuda()
    if number:
        return None
    named = os.environ.get(VISIBLE_GPUS)
    if has_gpu() and named is not None and not re.match(r"\s*(\d|GPU-|MIG-)", named):
        return f'{VISIBLE_GPUS}="{named}" hides every GPU'
    return reason


def has_gpu() -> bool:
    """Return whether the machine has an NVIDIA GPU, usable or not."""
    return _has_gpu_file() or _ask_cuda()[0] > 0


def _has_gpu_file() -> bool:
    return any(Path(path).exists() for path in GPU_FILES)


@cache
def _ask_cuda() -> tuple[int, str]:
    """Return the number of GPUs that CUDA's driver counts, and the reason if there are none."""
    try:
        driver = ctypes.CDLL(CUDA_DRIVER)
    except OSError as error:
        found = _has_gpu_file()
        cause = "NVIDIA's driver does not load" if found else "no NVIDIA GPU on this machine"
        return 0, f"{cause} ({error})"
    number, text = ctypes.c_int(0), ctypes.c_char_p()
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(number))
    driver.cuGetErrorString(status, ctypes.byref(text))
    return number.value, f"no NVIDIA GPU can be used (CUDA: {(text.value or b'').decode()})"


def peak_memory_mb() -> int | None:
    """Return this process's peak memory in MB without its workers', None without /proc.

    `getrusage` works on every system but includes the parent that forked this process.
    """
    lines = _lines("/proc/self/status")
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")), None)


def _lines(path: str) -> list[str]:
    """Return the lines of a file of /proc, none if the system has no such file."""
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []
