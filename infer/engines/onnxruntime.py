"""ONNX Runtime, on the CPU or on CUDA."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidGraph, InvalidProtobuf, NoSuchFile, NotImplemented

from infer.engines import Outputs
from isic.errors import UserError
from isic.preprocess import Pixels

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
LOAD_ERRORS = (Fail, InvalidGraph, InvalidProtobuf, NoSuchFile, NotImplemented)
CONTRACT = {
    "images": ("tensor(uint8)", 4),
    "features": ("tensor(float)", 2),
    "logits": ("tensor(float)", 2),
}
"""Type and rank of each input and output."""


class OnnxRuntimeEngine:
    """An ONNX file in an ONNX Runtime session."""

    def __init__(self, path: Path, size: int, device: str) -> None:
        """Opens a session.

        Args:
            path: the ONNX file.
            size: side of its images, pixels.
            device: `cpu` or `cuda`.

        Raises:
            UserError: the file is not a graph of this toolkit's contract, or the device's provider does not load.
        """
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
        try:
            self._session = ort.InferenceSession(str(path), options, providers=[PROVIDERS[device]])
        except LOAD_ERRORS as error:
            raise UserError(f"{path} does not load in ONNX Runtime ({_first_line(error)}); export it again") from None
        loaded = self._session.get_providers()[0]
        if loaded != PROVIDERS[device]:
            raise UserError(
                f"ONNX Runtime fell back to {loaded}: {PROVIDERS[device]} does not load here; run "
                "`python -m infer doctor`, or use --device cpu"
            )
        self.device = device
        self._check_contract(path, size)

    def run(self, images: Pixels) -> Outputs:
        features, logits = self._session.run(["features", "logits"], {"images": images})
        return features, logits

    def run_mask(self, images: Pixels) -> NDArray[np.float32]:
        """Returns the lesion's probabilities [n, h, w] of a graph with the optional output `mask`."""
        mask: NDArray[np.float32] = self._session.run(["mask"], {"images": images})[0]
        return mask

    def _check_contract(self, path: Path, size: int) -> None:
        nodes = {node.name: node for node in (*self._session.get_inputs(), *self._session.get_outputs())}
        for name, (dtype, rank) in CONTRACT.items():
            node = nodes.get(name)
            if node is None:
                raise UserError(f"{path} has no {name}, only {', '.join(nodes)}; export it again")
            if node.type != dtype or len(node.shape) != rank:
                raise UserError(f"{path}: {name} is {node.type} of rank {len(node.shape)}, not {dtype} of rank {rank}; "
                                "export it again")  # fmt: skip
        if list(nodes["images"].shape[1:]) != [size, size, 3] or isinstance(nodes["images"].shape[0], int):
            raise UserError(f"{path} takes images {nodes['images'].shape}, not [N, {size}, {size}, 3]; export it again")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def create(path: Path, manifest: Mapping[str, Any], device: str) -> OnnxRuntimeEngine:
    """Opens the session on `device`; `auto` is CUDA where ONNX Runtime can use a GPU."""
    if device == "auto":
        device = "cuda" if cuda_works() is None else "cpu"
    return OnnxRuntimeEngine(path, manifest["preprocess"]["size"], device)


def cuda_works() -> str | None:
    """Returns why the CUDA provider cannot be used here, None where it can."""
    if PROVIDERS["cuda"] not in ort.get_available_providers():
        return "this build of ONNX Runtime has no CUDA; install onnxruntime-gpu"
    if not Path("/dev/nvidiactl").exists() and os.name != "nt":
        return "no NVIDIA GPU or driver on this machine"
    return None
