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
CONTAINER_FILES = ("/.dockerenv", "/run/.containerenv")
"""Files that Docker and Podman put into their containers."""
MANAGEMENT_LIBRARY = "nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1"
COMPUTE_CAPABILITY = (75, 76)
"""CUDA's numbers of the attributes with the major and the minor compute capability."""
FIRST_DRIVERS = {11: 450, 12: 525, 13: 580}
"""The first NVIDIA driver of each major version of CUDA, from NVIDIA's table of compatibility."""

INSTALL_DRIVER = (
    "install NVIDIA's driver, or give a container NVIDIA_DRIVER_CAPABILITIES=compute,utility"
)
REPAIR_DRIVER = "restart the machine, or install NVIDIA's driver again"
DRIVER_FIXES = {
    34: "remove CUDA's folder `stubs` from LD_LIBRARY_PATH",
    46: "end the process that has the GPU for itself",
    100: f"run `unset {VISIBLE_GPUS}`, or use a machine with a GPU",
    802: "start the service nvidia-fabricmanager",
    803: "restart the machine, because its driver was updated",
    804: "remove CUDA's folder `compat` from LD_LIBRARY_PATH",
}
"""Fixes of the errors of CUDA's driver, by their number in `CUresult`."""

MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Files with the limit and the use of a control group, and the cached part of it in memory.stat."""

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
    limits = [_cpu_limit(folder) for folder in _control_groups(root, "cpu")]
    return min((limit for limit in limits if limit is not None), default=None)


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that this process can still use, None if that is unknown.

    It is the machine's free memory or, if that is less, the rest of what control groups (v1 or v2)
    allow. Memory that caches files counts as free.

    Args:
        root: folder in which /proc and the control groups' file systems are found.
    """
    try:
        lines = (root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return None
    sizes = dict(line.split(":", 1) for line in lines)
    free = [1024 * int(sizes["MemAvailable"].split()[0])]
    left = [_memory_left(folder) for folder in _control_groups(root, "memory")]
    return min(free + [size for size in left if size is not None])


def _memory_left(folder: Path) -> int | None:
    """Return the bytes that one control group has left, None if unlimited."""
    for limit, usage, cached in MEMORY_FILES:
        try:
            most, used = ((folder / name).read_text(encoding="utf-8") for name in (limit, usage))
            stat = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
        except OSError:  # of the other version, or the root of a hierarchy
            continue
        if most.strip() == "max":
            return None
        values = dict(line.split() for line in stat)
        return max(0, int(most) - int(used) + int(values.get(cached, 0)))
    return None


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups of a controller, and of their parents.

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
        name = {"cgroup2": "", "cgroup": controller}.get(kind)
        if name not in paths or (name and name not in options.split(",")):
            continue
        mounted, point = before.split()[3:5]  # a container may see only a part of the hierarchy
        own = paths[name]
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
    """Return why CUDA can use no GPU in this process, None if it can use one.

    The sentence is `cause; fix`.
    """
    number, reason = _ask_cuda()
    if number:
        return None
    named = os.environ.get(VISIBLE_GPUS)
    if has_gpu() and named is not None and not re.match(r"\s*(\d|GPU-|MIG-)", named):
        return f'{VISIBLE_GPUS}="{named}" hides every GPU; run `unset {VISIBLE_GPUS}`'
    return reason


def has_gpu() -> bool:
    """Return whether the machine has an NVIDIA GPU, usable or not."""
    return _has_gpu_file() or _ask_cuda()[0] > 0


def gpu_names() -> list[str]:
    """Return name and compute capability of each GPU that this process can use."""
    driver = cuda_driver()
    if isinstance(driver, OSError):
        return []
    return [_gpu_name(driver, device) for device in range(_ask_cuda()[0])]


def gpu_architecture() -> str | None:
    """Return the architecture of the first GPU (`sm89`), None if no GPU can be used."""
    driver = cuda_driver()
    if isinstance(driver, OSError) or not _ask_cuda()[0]:
        return None
    return f"sm{''.join(_compute_capability(driver, 0))}"


def _gpu_name(driver: ctypes.CDLL, device: int) -> str:
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), device)
    capability = ".".join(_compute_capability(driver, device))
    return f"{name.value.decode()}, compute capability {capability}"


def _compute_capability(driver: ctypes.CDLL, device: int) -> list[str]:
    """Return the major and the minor number."""
    capability = []
    for attribute in COMPUTE_CAPABILITY:
        value = ctypes.c_int(0)
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(str(value.value))
    return capability


def driver_cuda() -> str | None:
    """Return the newest CUDA that NVIDIA's driver can run (`12.6`), None if no driver loads."""
    driver = cuda_driver()
    if isinstance(driver, OSError):
        return None
    number = ctypes.c_int(0)
    driver.cuDriverGetVersion(ctypes.byref(number))
    return cuda_version(number.value) if number.value else None


def cuda_version(number: int) -> str:
    """Return the version that CUDA writes as one number: `12.6` for 12060."""
    return f"{number // 1000}.{number % 1000 // 10}"


def old_driver_reason(library: str, built_for: str | None) -> str | None:
    """Return that NVIDIA's driver is too old for a library, None if it is not, or is missing.

    A driver runs every CUDA of its own major version and of older ones. Source: NVIDIA's
    documentation of CUDA's compatibility of minor versions.

    Args:
        library: its name and version.
        built_for: the CUDA that it was built for (`13.0`), None if for none.
    """
    found = driver_cuda()
    if not found or not built_for or _major(built_for) <= _major(found):
        return None
    return (
        f"{library} was built for CUDA {built_for}, and the NVIDIA driver runs CUDA up to {found}"
    )


def driver_for(cuda: str | None) -> str:
    """Return the NVIDIA driver that runs a version of CUDA, in words."""
    first = FIRST_DRIVERS.get(_major(cuda)) if cuda else None
    return f"NVIDIA driver {first} or newer" if first else "a newer NVIDIA driver"


def _major(version: str) -> int:
    return int(version.split(".", maxsplit=1)[0])


def nvidia_driver(module: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Return the version of NVIDIA's driver (`580.65.06`), None if it is not found.

    Args:
        module: the file in which Linux's kernel module names itself. Windows and WSL2 have none,
            and there the library that `nvidia-smi` uses is asked.
    """
    if module.is_file():
        found = re.search(r"\d{3,}(\.\d+)+", module.read_text(encoding="utf-8"))
        return found[0] if found else None
    try:
        library = ctypes.CDLL(MANAGEMENT_LIBRARY)
    except OSError:
        return None
    version = ctypes.create_string_buffer(80)
    if library.nvmlInit_v2() or library.nvmlSystemGetDriverVersion(version, len(version)):
        return None
    return version.value.decode()


def _has_gpu_file() -> bool:
    return any(Path(path).exists() for path in GPU_FILES)


@cache
def cuda_driver() -> ctypes.CDLL | OSError:
    """Return the library of CUDA's driver, or why it does not load."""
    try:
        return ctypes.CDLL(CUDA_DRIVER)
    except OSError as error:
        return error


@cache
def _ask_cuda() -> tuple[int, str]:
    """Return the number of GPUs that CUDA's driver counts, and the reason if there are none."""
    driver = cuda_driver()
    if isinstance(driver, OSError):
        return 0, _no_driver_reason(driver)
    number, text = ctypes.c_int(0), ctypes.c_char_p()
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(number))
    driver.cuGetErrorString(status, ctypes.byref(text))
    cause = f"no NVIDIA GPU can be used (CUDA: {(text.value or b'').decode()})"
    return number.value, f"{cause}; {DRIVER_FIXES.get(status, REPAIR_DRIVER)}"


def _no_driver_reason(error: OSError) -> str:
    """Return why the library of CUDA's driver does not load: no GPU, no driver or a broken one.

    The loader names the library itself only if that is the file which is missing.
    """
    text = str(error)
    is_missing = CUDA_DRIVER in text and "no such file" in text.lower()
    if isinstance(error, FileNotFoundError) or is_missing:
        if _has_gpu_file():
            return f"NVIDIA's driver is not installed ({text}); {INSTALL_DRIVER}"
        if any(Path(path).exists() for path in CONTAINER_FILES):
            return (
                "this container has no NVIDIA GPU; start it with `--gpus all` if its host has one"
            )
        return "this machine has no NVIDIA GPU; use one that has"
    return f"NVIDIA's driver does not load ({text}); {REPAIR_DRIVER}"


def peak_memory_mb() -> int | None:
    """Return this process's peak memory in MB without its workers', None without /proc.

    `getrusage` works on every system but includes the parent that forked this process.
    """
    lines = _lines("/proc/self/status")
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")), None)


def _lines(path: str) -> list[str]:
    """Return the lines of a file of /proc, none if the system has no such file."""
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []
