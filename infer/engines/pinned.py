"""Page-locked host memory: a GPU copies from it faster, and while the host goes on.

Calls go to the library of NVIDIA's driver, so every engine's input can be page-locked with no
other library.
"""

import ctypes
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isic.runtime.errors import warn
from isic.runtime.machine import cuda_driver

PORTABLE = 1
"""CUDA's flag CU_MEMHOSTREGISTER_PORTABLE: for every CUDA context of the process."""


def page_locked(array: NDArray[Any], device: str) -> NDArray[Any]:
    """Lock the memory of an array for a GPU, and return a view of it that holds the lock.

    The lock ends with the last view. Prints a warning if CUDA refuses it, since copies are then
    only slower.

    Args:
        array: contiguous; its memory must outlive the view.
        device: for any other than `cuda` the array itself is returned.
    """
    if device != "cuda" or not array.nbytes:
        return array
    driver = cuda_driver()
    reason = str(driver) if isinstance(driver, OSError) else _lock(driver, array)
    if reason:
        warn(f"the input of the GPU cannot be page-locked ({reason}), so copies to it are slower")
        return array
    assert not isinstance(driver, OSError)
    return np.asarray(_Locked(array, driver))


class _Locked:
    """Hands an array's memory on through numpy's interface, which keeps this object alive."""

    def __init__(self, array: NDArray[Any], driver: ctypes.CDLL) -> None:
        self._array = array
        self.__array_interface__ = array.__array_interface__
        address = ctypes.c_void_p(array.ctypes.data)
        # The array too, since the lock must end before the memory is freed.
        weakref.finalize(self, _unlock, driver, address, array)


def _lock(driver: ctypes.CDLL, array: NDArray[Any]) -> str | None:
    """Lock an array's memory in the context that CUDA's runtime uses. Return why it failed."""
    device, context = ctypes.c_int(0), ctypes.c_void_p()
    address, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
    status = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        or driver.cuCtxSetCurrent(context)
        or driver.cuMemHostRegister_v2(address, size, PORTABLE)
    )
    if not status:
        return None
    text = ctypes.c_char_p()
    driver.cuGetErrorString(status, ctypes.byref(text))
    return (text.value or b"unknown error").decode()


def _unlock(driver: ctypes.CDLL, address: ctypes.c_void_p, array: NDArray[Any]) -> None:
    driver.cuMemHostUnregister(address)
