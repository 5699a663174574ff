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
    locked = str(driver) if isinstance(driver, OSError) else _lock(driver, array)
    if isinstance(locked, str):
        warn(f"the input of the GPU cannot be page-locked ({locked}), so copies to it are slower")
        return array
    return np.asarray(locked)


class _Locked:
    """Hands an array's memory on through numpy's interface, which keeps this object alive."""

    def __init__(self, array: NDArray[Any], driver: ctypes.CDLL, context: ctypes.c_void_p) -> None:
        self._array = array
        self.__array_interface__ = array.__array_interface__
        address = ctypes.c_void_p(array.ctypes.data)
        # The array too, since the lock must end before the memory is freed.
        weakref.finalize(self, _unlock, driver, context, address, array)


def _lock(driver: ctypes.CDLL, array: NDArray[Any]) -> _Locked | str:
    """Lock an array's memory in the context that CUDA's runtime uses, or return why it failed."""
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
        return _Locked(array, driver, context)
    text = ctypes.c_char_p()
    driver.cuGetErrorString(status, ctypes.byref(text))
    return (text.value or b"unknown error").decode()


def _unlock(
    driver: ctypes.CDLL, context: ctypes.c_void_p, address: ctypes.c_void_p, array: NDArray[Any]
) -> None:
    # Any thread may be the last that holds a view; one that has not used CUDA has no context.
    driver.cuCtxSetCurrent(context)
    driver.cuMemHostUnregister(address)
