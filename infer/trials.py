"""The doctor's trials: each really uses one library, in a process of its own.

A trial returns its facts as JSON has them, or raises any exception; it may also crash or hang.
Libraries are imported in the functions, so that a broken one fails only its own trial.
"""
# ruff: noqa: PLC0415

from importlib import import_module
from pathlib import Path
from typing import Any

from isic.runtime.errors import UserError
from isic.runtime.extras import missing_library
from isic.runtime.machine import driver_cuda, gpu_names, no_gpu_reason, nvidia_driver

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
    from infer.engines import import_engine, unavailable_reason

    reason = unavailable_reason(name, device)
    try:
        engine = import_engine(name)
    except UserError:
        return {"reason": reason}
    if reason is None and hasattr(engine, "run_one_node"):  # the others have just run one
        try:
            engine.run_one_node(name)
        except UserError as error:
            reason = str(error)
    return {"reason": reason, "cuda": engine.built_for()}


def try_artifact(folder: str, name: str, precision: str, device: str) -> dict[str, Any]:
    """Run the artifact of a format and a precision in a fold's folder on a batch of two images."""
    import numpy as np

    from infer.engines import load
    from isic.runtime.files import read_json

    for path in sorted(Path(folder).glob("*.json")):
        manifest = read_json(path)
        if (manifest.get("format"), manifest.get("precision")) == (name, precision):
            break
    else:
        return {"reason": f"{folder} has no {name} in {precision}"}
    size = manifest["preprocess"]["size"]
    try:
        engine = load(path.with_name(manifest["artifact"]), device)
        engine.run(np.zeros((2, size, size, 3), np.uint8))
        engine.close()
    except UserError as error:
        return {"reason": str(error)}
    return {"reason": None}


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
    from infer.ensemble.boosting.libraries import LIBRARIES

    return {name: library.package for name, library in LIBRARIES.items()}


def try_booster(library: str) -> dict[str, Any]:
    """Fit a booster of two trees on a few rows, load it and score them."""
    import numpy as np

    from infer.ensemble.boosting.libraries import LIBRARIES, fit_booster, parameters_of

    matrix = np.linspace(0, 1, NUM_ROWS, dtype=np.float32).reshape(-1, 1)
    target = (matrix[:, 0] > 0.5).astype(np.int64)
    parameters = parameters_of(library, {"num_rounds": 2})
    try:
        text = fit_booster(library, matrix, target, ["x"], parameters, seed=0)
    except UserError as error:
        return {"reason": str(error)}
    scores = LIBRARIES[library].load(text)(matrix, 1)
    if not scores[-1] > scores[0]:
        raise ArithmeticError(f"{library} does not tell the classes apart")
    return {"reason": None}
