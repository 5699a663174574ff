"""The doctor's trials: each really uses one library, in a process of its own.

A trial returns its facts, or raises any exception; it may also crash or hang.
"""

from importlib import import_module
from typing import Any

from isic.runtime.errors import UserError
from isic.runtime.extras import missing_library
from isic.runtime.machine import driver_cuda, gpu_names, no_gpu_reason, nvidia_driver

BOOSTERS = "infer.ensemble.boosters"
ENGINES = "infer.engines"
NUM_ROWS = 64
"""Rows that a booster is fitted on: enough for one split of the smallest leaves."""


def describe_gpus() -> dict[str, Any]:
    """Return the driver's version, its CUDA, the GPUs, and why there are none."""
    return {
        "driver": nvidia_driver(),
        "cuda": driver_cuda(),
        "gpus": gpu_names(),
        "reason": no_gpu_reason(),
    }


def try_engine(name: str, device: str) -> dict[str, Any]:
    """Run a format's engine on a graph of one node."""
    engines = import_module(ENGINES)
    reason = engines.unavailable_reason(name, device)
    try:
        built_for = engines.import_engine(name).built_for()
    except UserError:
        built_for = None
    return {"reason": reason, "cuda": built_for}


def try_module(module: str) -> dict[str, Any]:
    """Import a module."""
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        optional = missing_library(error)
        if optional is None:
            raise
        return {"reason": str(optional)}
    return {"reason": None}


def booster_packages() -> dict[str, str]:
    """Return the distribution of each library of boosters."""
    libraries = import_module(BOOSTERS).LIBRARIES
    return {name: library.package for name, library in libraries.items()}


def try_booster(library: str) -> dict[str, Any]:
    """Fit a booster of two trees on a few rows, load it and score them."""
    numpy = import_module("numpy")
    boosters = import_module(BOOSTERS)
    matrix = numpy.linspace(0, 1, NUM_ROWS, dtype=numpy.float32).reshape(-1, 1)
    target = (matrix[:, 0] > 0.5).astype(numpy.int64)
    parameters = boosters.parameters_of(library, {"num_rounds": 2})
    try:
        text = boosters.fit_booster(library, matrix, target, ["x"], parameters, seed=0)
    except UserError as error:
        return {"reason": str(error)}
    scores = boosters.LIBRARIES[library].load(text)(matrix, 1)
    if not scores[-1] > scores[0]:
        raise ArithmeticError("its scores are wrong")
    return {"reason": None}
