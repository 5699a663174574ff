"""AOTInductor packages: torch's own compiler ahead of time, for the CPU or the GPU of this machine."""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._inductor import aoti_compile_and_package
from torch._inductor.exc import InductorError

from export.formats import Target
from export.onnx_graph import TRACED_BATCH, quiet
from export.precision import lowered
from infer.engines.aoti import architecture, forbid_tf32, needed_features
from isic.runtime.errors import UserError
from train.model import Classifier

REASON = re.compile(r"\b(error|fatal)\s*:|cannot find")
"""Matches the line in which a compiler, an assembler (`error   :`) or a linker gives its reason."""
INCOMPLETE = re.compile(r"No such file|cannot find|No working C\+\+ compiler")
"""Matches a reason that is a missing compiler, header or library."""


def file_name(target: Target) -> str:
    return f"model.{target.precision}.{architecture(target.device)}.pt2"


def build(model: Classifier, target: Target, path: Path) -> dict[str, Any]:
    """Compiles `model` for batches of 1 to `max_batch` images on the target's device.

    Raises:
        UserError: what compiles on this machine does not work.
    """
    forbid_tf32()
    low = lowered(model, target.precision).to(target.device)
    example = torch.zeros(
        (traced_batch(target), target.size, target.size, 3), dtype=torch.uint8, device=target.device
    )
    most = max(target.options.max_batch, TRACED_BATCH)  # torch takes no range of one size
    batch = torch.export.Dim("batch", min=1, max=most)
    notes = quiet("torch.utils.cpp_extension")
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        notes,
        torch.no_grad(),
        complaints(),
    ):
        warnings.simplefilter("ignore")  # the compiler's notes on its own internals
        program = torch.export.export(
            low, (example,), dynamic_shapes={"images": {0: batch}}, strict=False
        )
        options = {"max_autotune": True} if target.options.max_autotune else {}
        aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
    features = {"cpu_features": needed_features()} if target.device == "cpu" else {}
    return {
        "architecture": architecture(target.device),
        **features,
        "max_batch": target.options.max_batch,
    }


def traced_batch(target: Target) -> int:
    """Returns the images of the example: on a GPU kernels are chosen for them, and one would count as a constant."""
    return max(target.options.opt_batch, TRACED_BATCH) if target.device == "cuda" else TRACED_BATCH


@contextlib.contextmanager
def complaints() -> Iterator[None]:
    """Turns what torch's compiler raises, with whole command lines in it, into a UserError of one sentence."""
    try:
        yield
    except InductorError as error:
        lines = str(error).strip().splitlines()
        reason = next((line.strip() for line in lines if REASON.search(line)), lines[0])
        advice = (
            "AOTInductor needs g++, and for a GPU CUDA's headers and libcuda.so where g++ finds "
            "them: install what is missing"
            if INCOMPLETE.search(reason)
            else "choose another --precision"
        )
        raise UserError(
            f"torch cannot compile here ({reason}); {advice}, or leave out --formats aoti"
        ) from error
