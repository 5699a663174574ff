"""A fake NVIDIA driver: libraries that this machine need not have, compiled for a test."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

DRIVER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static int failure;
static __thread void *current;
static int number(const char *name) { return getenv(name) ? atoi(getenv(name)) : 0; }
int cuInit(unsigned flags) { return number("FAKE_STATUS"); }
int cuDriverGetVersion(int *version) { *version = number("FAKE_CUDA"); return 0; }
int cuDeviceGetCount(int *count) { *count = number("FAKE_COUNT"); return 0; }
int cuDeviceGetName(char *name, int size, int device) {
    strncpy(name, "NVIDIA Fake", size);
    return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 8 : attribute == 76 ? 9 : -1;
    return 0;
}
int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &failure; return 0; }
int cuCtxSetCurrent(void *context) {
    current = context;
    return context == &failure ? 0 : 201;
}
int cuMemHostRegister_v2(void *start, size_t size, unsigned flags) {
    if (flags != 1 || number("FAKE_FULL")) return 2;
    printf("lock %p %zu\n", start, size);
    return fflush(stdout);
}
int cuMemHostUnregister(void *start) {
    if (current != &failure) return 201;
    printf("unlock %p\n", start);
    return fflush(stdout);
}
int cuGetErrorString(int status, const char **text) {
    *text = status == 2 ? "out of memory" : "system not yet initialized";
    return 0;
}
"""
MANAGEMENT = """
#include <string.h>
int nvmlInit_v2(void) { return 0; }
int nvmlSystemGetDriverVersion(char *version, unsigned size) {
    strncpy(version, "560.35.03", size);
    return 0;
}
"""
LIBRARIES = {"libcuda.so.1": DRIVER, "libnvidia-ml.so.1": MANAGEMENT}


def install(folder: Path, count: int = 1, status: int = 0, cuda: int = 12060) -> dict[str, str]:
    """Compile the driver into a folder; returns the environment of a process that finds it.

    Args:
        folder: for the libraries.
        count: of its GPUs.
        status: of its start, as CUDA numbers errors.
        cuda: the newest CUDA that it runs, as CUDA numbers versions.
    """
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    for name, source in LIBRARIES.items():
        if not (folder / name).exists():
            (folder / "driver.c").write_text(source)
            command = ["cc", "-shared", "-fPIC", "-o", folder / name, folder / "driver.c"]
            subprocess.run(command, check=True)
    variables = {"FAKE_COUNT": str(count), "FAKE_STATUS": str(status), "FAKE_CUDA": str(cuda)}
    return environment(folder) | variables


def install_broken(folder: Path) -> dict[str, str]:
    """Write a driver that does not load; returns the environment of a process that finds it."""
    (folder / "libcuda.so.1").touch()
    return environment(folder)


def environment(folder: Path) -> dict[str, str]:
    """Return this process's environment with the libraries of a folder and every GPU visible."""
    kept = {key: text for key, text in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    return kept | {"LD_LIBRARY_PATH": str(folder)}
