"""ONNX Runtime, on the CPU, on CUDA, or on a GPU by way of TensorRT."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import (
    Fail,
    InvalidGraph,
    InvalidProtobuf,
    NoSuchFile,
    NotImplemented,
)

from infer.engines import Outputs
from isic.errors import UserError
from isic.machine import cores
from isic.preprocess import Pixels

PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider"],
}
"""By device, the provider that must load first, and what runs the nodes that it does not."""
PROVIDER_OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0"}}
"""float32 is to be float32: TF32 fails the parity gate."""
LOAD_ERRORS = (Fail, InvalidGraph, InvalidProtobuf, NoSuchFile)
CONTRACT = {
    "images": ("tensor(uint8)", 4),
    "features": ("tensor(float)", 2),
    "logits": ("tensor(float)", 2),
}
"""Type and rank of each input and output."""


class OnnxRuntimeEngine:
    """An ONNX file in an ONNX Runtime session.

    On a CPU each core takes one image at a time: its cache then holds the activations, no core waits for another after
    each layer, and what is said of an image does not depend on its batch, not even where int8 chooses its scales.
    """

    def __init__(self, path: Path, size: int, device: str) -> None:
        """Opens a session.

        Args:
            path: the ONNX file.
            size: side of its images, pixels.
            device: a key of PROVIDERS.

        Raises:
            UserError: the file is not a graph of this toolkit's contract, or the device's provider does not load.
        """
        self.device = "cpu" if device == "cpu" else "cuda"
        wanted = PROVIDERS[device][0]
        providers = [(name, PROVIDER_OPTIONS.get(name, {})) for name in PROVIDERS[device]]
        if self.device == "cuda":
            ort.preload_dlls()  # finds the CUDA libraries that torch brings
            options = session_options()
        else:
            options = session_options(num_threads=1)
            self._pool = ThreadPoolExecutor(len(cores()), thread_name_prefix="onnxruntime")
        try:
            self._session = ort.InferenceSession(str(path), options, providers=providers)
        except NotImplemented as error:
            raise UserError(
                f"{path}: ONNX Runtime {ort.__version__} has no kernel for one of its operators in "
                f"its precision on --device {device} ({_first_line(error)}); use another "
                "--precision or --device, or a newer ONNX Runtime"
            ) from None
        except LOAD_ERRORS as error:
            raise UserError(
                f"{path} does not load in ONNX Runtime ({_first_line(error)}); export it again"
            ) from None
        loaded = self._session.get_providers()[0]
        if loaded != wanted:
            raise UserError(
                f"ONNX Runtime fell back to {loaded}: {wanted} does not load here; run "
                "`python -m infer doctor`, or use --device cpu"
            )
        self._check_contract(path, size)

    def run(self, images: Pixels) -> Outputs:
        features, logits = self._run(("features", "logits"), images)
        return features, logits

    def run_mask(self, images: Pixels) -> NDArray[np.float32]:
        """Returns the lesion's probabilities [n, h, w] of a graph with the optional output `mask`."""
        return self._run(("mask",), images)[0]

    def _run(self, names: Sequence[str], images: Pixels) -> list[NDArray[np.float32]]:
        return (
            self._run_whole(names, images)
            if self.device == "cuda"
            else self._run_each(names, images)
        )

    def _run_each(self, names: Sequence[str], images: Pixels) -> list[NDArray[np.float32]]:
        """Runs the graph on each image, as many at once as there are cores."""

        def run(at: int) -> list[NDArray[np.float32]]:
            outputs: list[NDArray[np.float32]] = self._session.run(
                names, {"images": images[at : at + 1]}
            )
            return outputs

        return [
            np.concatenate(values)
            for values in zip(*self._pool.map(run, range(len(images))), strict=True)
        ]

    def _run_whole(self, names: Sequence[str], images: Pixels) -> list[NDArray[np.float32]]:
        """Runs the graph with its input and outputs bound to the device, so that each is copied once."""
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(
            "images", ort.OrtValue.ortvalue_from_numpy(images, self.device, 0)
        )
        for name in names:
            binding.bind_output(name, self.device)
        self._session.run_with_iobinding(binding)
        outputs: list[NDArray[np.float32]] = binding.copy_outputs_to_cpu()
        return outputs

    def _check_contract(self, path: Path, size: int) -> None:
        nodes = {
            node.name: node for node in (*self._session.get_inputs(), *self._session.get_outputs())
        }
        for name, (dtype, rank) in CONTRACT.items():
            node = nodes.get(name)
            if node is None:
                raise UserError(f"{path} has no {name}, only {', '.join(nodes)}; export it again")
            if node.type != dtype or len(node.shape) != rank:
                raise UserError(f"{path}: {name} is {node.type} of rank {len(node.shape)}, not {dtype} of rank {rank}; "
                                "export it again")  # fmt: skip
        if list(nodes["images"].shape[1:]) != [size, size, 3] or isinstance(
            nodes["images"].shape[0], int
        ):
            raise UserError(
                f"{path} takes images {nodes['images'].shape}, not [N, {size}, {size}, 3]; export it again"
            )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def session_options(num_threads: int | None = None) -> ort.SessionOptions:
    """Returns options with so many threads, or one for each core that this process may use.

    Threads that wait give their core back instead of spinning: another session, the decoder or another process has work
    for it.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.intra_op_num_threads = num_threads or len(cores())
    return options


def create(path: Path, manifest: Mapping[str, Any], device: str) -> OnnxRuntimeEngine:
    """Opens the session on `device`; `auto` is CUDA where ONNX Runtime can use a GPU."""
    if device == "auto":
        device = "cuda" if works("onnx", "cuda") is None else "cpu"
    return OnnxRuntimeEngine(path, manifest["preprocess"]["size"], device)


def works(name: str, device: str) -> str | None:
    """Returns why the provider of a device (a key of PROVIDERS) cannot be used here, None where it can."""
    provider = PROVIDERS[device][0]
    if provider not in ort.get_available_providers():
        return f"this build of ONNX Runtime has no {provider}; install onnxruntime-gpu"
    if device != "cpu" and not Path("/dev/nvidiactl").exists() and os.name != "nt":
        return "no NVIDIA GPU or driver on this machine"
    return None
