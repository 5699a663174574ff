"""AOTInductor packages: torch's own compiler ahead of time, for the CPU or the GPU of this machine."""

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch._inductor import aoti_compile_and_package

from export.formats import Target
from export.onnx_graph import TRACED_BATCH, quiet
from export.precision import lowered
from infer.engines.aoti import architecture
from isic.errors import UserError
from train.model import Classifier


def file_name(target: Target) -> str:
    return f"model.{target.precision}.{architecture(target.device)}.pt2"


def build(model: Classifier, target: Target, path: Path) -> dict[str, Any]:
    """Compiles `model` for batches of 1 to `max_batch` images on the target's device.

    Raises:
        UserError: there is no working compiler on this machine.
    """
    low = lowered(model, target.precision).to(target.device)
    example = torch.zeros((TRACED_BATCH, target.size, target.size, 3), dtype=torch.uint8, device=target.device)
    batch = torch.export.Dim("batch", min=1, max=target.options.max_batch)
    notes = quiet("torch.utils.cpp_extension")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), notes, torch.no_grad():
        warnings.simplefilter("ignore")  # the compiler's notes on its own internals
        program = torch.export.export(low, (example,), dynamic_shapes={"images": {0: batch}}, strict=False)
        options = {"max_autotune": True} if target.options.max_autotune else {}
        try:
            aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
        except torch._inductor.exc.CppCompileError as error:
            raise UserError(f"torch cannot compile here ({str(error).splitlines()[0]}); install g++") from None
        except torch._inductor.exc.InvalidCxxCompiler:
            raise UserError("AOTInductor needs a C++ compiler; install g++, or leave out --formats aoti") from None
    return {"architecture": architecture(target.device), "max_batch": target.options.max_batch}
