"""AOTInductor packages: torch's ahead-of-time compiler, for the CPU or the GPU of this machine."""

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

from export.formats import ArtifactSpec, BuildInputs
from export.network import artifact_network
from export.onnx_graph import TRACED_BATCH, quiet
from infer.engines.aoti import forbid_tf32, needed_features, package_architecture
from infer.engines.contract import IMAGES
from isic.runtime.errors import UserError

ERROR_MARKERS = re.compile(r"\b(error|fatal)\s*:|cannot find")
"""Matches the line with the reason of a compiler, an assembler (`error   :`) or a linker."""
MISSING_MARKERS = re.compile(r"No such file|cannot find|No working C\+\+ compiler|CUDA_HOME")
"""Matches a reason that is a missing compiler, header or library."""


def file_name(spec: ArtifactSpec) -> str:
    return ".".join(("model", *spec.variant, package_architecture(spec.device), "pt2"))


def build(spec: ArtifactSpec, inputs: BuildInputs, path: Path) -> dict[str, Any]:
    """Compile a network for batches of 1 to `max_batch` images on the spec's device.

    Raises:
        UserError: the compiler does not work on this machine.
    """
    forbid_tf32()
    network = artifact_network(inputs.model, spec.precision, spec.options.tta).to(spec.device)
    shape = (traced_batch(spec), inputs.size, inputs.size, 3)
    example = torch.zeros(shape, dtype=torch.uint8, device=spec.device)
    # A dynamic dimension whose range is a single size is refused (the assertion of
    # pytorch/pytorch#122295, torch 2.14), so a package for one image also accepts two.
    largest = max(spec.options.max_batch, TRACED_BATCH)
    batch = torch.export.Dim("batch", min=1, max=largest)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        quiet("torch.utils.cpp_extension"),
        torch.no_grad(),
        compiler_errors_as_user_errors(),
    ):
        warnings.simplefilter("ignore")  # they are about the compiler's own internals
        program = torch.export.export(
            network, (example,), dynamic_shapes={IMAGES: {0: batch}}, strict=False
        )
        configs = {"max_autotune": True} if spec.options.max_autotune else {}
        aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)
    facts = {
        "architecture": package_architecture(spec.device),
        "max_batch": spec.options.max_batch,
    }
    if spec.device == "cpu":
        return {**facts, "cpu_features": needed_features()}
    # One call for an embedding batch. A package has a runner for each batch in flight, and a call
    # that waits for one holds the interpreter lock (pytorch/pytorch#197516).
    return {**facts, "batch_size": spec.options.opt_batch}


def traced_batch(spec: ArtifactSpec) -> int:
    """Return the batch size of the example; kernels for a GPU are chosen for it."""
    if spec.device == "cuda":
        return max(spec.options.opt_batch, TRACED_BATCH)
    return TRACED_BATCH


@contextlib.contextmanager
def compiler_errors_as_user_errors() -> Iterator[None]:
    """Turn a compiler's error, whose text has whole command lines in it, into a UserError."""
    try:
        yield
    except InductorError as error:
        lines = [line.strip() for line in str(error).strip().splitlines()]
        marked = [line for line in lines if ERROR_MARKERS.search(line)]
        reason = marked[0] if marked else lines[0]
        if MISSING_MARKERS.search(reason):
            advice = (
                "AOTInductor needs g++, and for a GPU also CUDA's headers and libcuda.so in the "
                "paths of g++: install the missing one"
            )
        else:
            advice = "choose another --precision"
        raise UserError(
            f"torch cannot compile here ({reason}); {advice}, or leave out --formats aoti"
        ) from error
