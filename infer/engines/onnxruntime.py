"""ONNX Runtime, on the CPU or on CUDA."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import (
    EPFail,
    Fail,
    InvalidGraph,
    InvalidProtobuf,
    NoSuchFile,
    NotImplemented,
    RuntimeException,
)

from infer.engines import Engine, Pending
from infer.engines.contract import (
    IMAGES,
    REQUIRED,
    RESULTS,
    Tensor,
    contract_violation,
    required_tensors,
)
from isic.layout import Fold
from isic.preprocess import Pixels
from isic.runtime.errors import UserError, first_line
from isic.runtime.extras import install_command
from isic.runtime.machine import (
    driver_cuda,
    driver_for,
    no_gpu_reason,
    num_cores,
    old_driver_reason,
)

CUDA_OPTIONS = {
    "use_tf32": "0",  # TF32 would fail float32's parity check
    "cudnn_conv_algo_search": "HEURISTIC",  # by default every kernel is tried per batch size
    # By default a session takes memory in powers of two, and every fold has a session.
    "arena_extend_strategy": "kSameAsRequested",
}
GPU_RUNS = 2
"""Batches that run at once on a GPU: one is copied while the other is computed."""
PROVIDERS: dict[str, list[str | tuple[str, dict[str, str]]]] = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": [("CUDAExecutionProvider", CUDA_OPTIONS), "CPUExecutionProvider"],
}
"""Providers by device, in the order in which they take nodes."""
LOAD_ERRORS = (Fail, InvalidGraph, InvalidProtobuf, NoSuchFile)
# A run with bindings and a copy to a device raise RuntimeError for whatever fails.
RUN_ERRORS = (EPFail, Fail, RuntimeException, RuntimeError)
ORT_DTYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32", "tensor(float16)": "float16"}
"""numpy's names of the types that ONNX Runtime reports; it has others, which no contract names."""

CUDA_LIBRARIES = ("cublasLt", "cublas", "nvrtc", "curand", "cufft", "cudart", "cudnn")
"""The libraries of CUDA's provider, each after those that it needs."""

REINSTALL = "run `pip install --force-reinstall onnxruntime`"
CUDA_FIXES = {
    "cannot open shared object": 'run `pip install "onnxruntime-gpu[cuda,cudnn]"`',
    "Could not find module": 'run `pip install "onnxruntime-gpu[cuda,cudnn]"`',
    "no kernel image": f"run `{install_command('cuda12')}`, which has kernels for older GPUs",
    "out of memory": "end other processes on the GPU",
    "": "see https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html",
}
"""Fixes of errors of CUDA's provider, by a part of the message; the first match counts."""

# Both graphs are bytes because inference runs without the package onnx.
IDENTITY = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12'
    b"\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)
"""An ONNX graph of one node, y = Identity(x), float32 [1]."""
INT8_PRODUCT = (
    b"\x08\x08:Z\n\x18\n\x01a\n\x01w\x12\x01y"
    b'"\rMatMulInteger\x12\x01g*\x0f\x08\x04\x08\x01\x10\x03B\x01w'
    b"J\x04\x7f\x7f\x7f\x7fZ\x14\n\x01a\x12\x0f\n\r\x08\x02\x12\t\n\x03\x12\x01n"
    b"\n\x02\x08\x04b\x14\n\x01y"
    b"\x12\x0f\n\r\x08\x06\x12\t\n\x03\x12\x01n\n\x02\x08\x01B\x04\n\x00\x10\r"
)
"""An ONNX graph of one node, y = MatMulInteger(a, w): a uint8 [n, 4], w int8 [4, 1], all 127."""
EXACT_INT8 = ("session.x64quantprecision", "1")
"""The option to store int8 weights as uint8 with matching zero points (ONNX Runtime 1.13+).

x86 CPUs without VNNI add two products of uint8 and int8 into a saturating int16. Their products of
uint8 and uint8 are exact (https://github.com/microsoft/onnxruntime/pull/12088)."""


class OnnxRuntimeEngine(Engine):
    """ONNX files in ONNX Runtime sessions, run by a pool of threads.

    On a CPU each core runs one image at a time. Its cache then holds the activations, no core
    waits for another after each layer, and the results of an image do not depend on its batch,
    even if int8 chooses scales from the activations. On a GPU each thread runs whole batches, so
    that one is copied while another one is computed.
    """

    def __init__(
        self,
        artifacts: Mapping[Fold, Path],
        size: int,
        device: str,
        required: Collection[str] = REQUIRED,
    ) -> None:
        """Open a session per artifact.

        Args:
            artifacts: the ONNX file by fold.
            size: side of the images, pixels.
            device: a key of PROVIDERS.
            required: the tensors that each graph must have.

        Raises:
            UserError: a file is not a graph of this toolkit's contract, or ONNX Runtime does not
                run on the device.
        """
        self.device = device
        self.folds = tuple(artifacts)
        reason = unavailable_reason("onnx", device)
        if reason:
            other = "" if device == "cpu" else ", or use --device cpu"
            raise UserError(f"ONNX Runtime does not run on --device {device} here: {reason}{other}")
        self._sessions = {
            fold: open_graph(path, size, device, required) for fold, path in artifacts.items()
        }
        self._results = {fold: result_names(session) for fold, session in self._sessions.items()}
        num_threads = num_cores() if device == "cpu" else GPU_RUNS
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="onnxruntime")

    def submit(self, images: Pixels, folds: Iterable[Fold] | None = None) -> Pending:
        chosen = self.folds if folds is None else folds
        return self._submit({fold: self._results[fold] for fold in chosen}, images)

    def run_other(self, images: Pixels, name: str) -> NDArray[np.float32]:
        """Return an output of the only graph that no batch's result has."""
        (outputs,) = self._submit(dict.fromkeys(self.folds, (name,)), images).result().values()
        values: NDArray[np.float32] = outputs[0]
        return values

    def close(self) -> None:
        self._pool.shutdown()

    def _submit(
        self, names: Mapping[Fold, Sequence[str]], images: Pixels
    ) -> "Rows | Future[dict[Fold, Any]]":
        """Start to compute the named outputs of each fold."""
        if self.device == "cuda":
            return self._pool.submit(self._run_batch, names, images)
        rows = [images[row : row + 1] for row in range(len(images))]
        return Rows({fold: self._submit_rows(names[fold], rows, fold) for fold in names})

    def _submit_rows(
        self, names: Sequence[str], rows: Iterable[Pixels], fold: Fold
    ) -> list[Future[list[Any]]]:
        """Start one fold's graph on each image separately."""
        session = self._sessions[fold]
        return [self._pool.submit(session.run, names, {IMAGES: row}) for row in rows]

    def _run_batch(
        self, names: Mapping[Fold, Sequence[str]], images: Pixels
    ) -> dict[Fold, list[Any]]:
        """Run each fold's graph on one copy of the batch; each output is copied once."""
        with device_errors_as_user_errors():
            on_device = ort.OrtValue.ortvalue_from_numpy(images, self.device, 0)
            return {fold: self._run_bound(names[fold], on_device, fold) for fold in names}

    def _run_bound(self, names: Sequence[str], images: ort.OrtValue, fold: Fold) -> list[Any]:
        session = self._sessions[fold]
        binding = session.io_binding()
        binding.bind_ortvalue_input(IMAGES, images)
        for name in names:
            binding.bind_output(name, self.device)
        session.run_with_iobinding(binding)
        outputs: list[Any] = binding.copy_outputs_to_cpu()
        return outputs


class Rows:
    """A batch whose images run one by one."""

    def __init__(self, futures: Mapping[Fold, Sequence[Future[list[Any]]]]) -> None:
        self._futures = futures

    def result(self) -> dict[Fold, Any]:
        with device_errors_as_user_errors():
            return {fold: self._outputs(rows) for fold, rows in self._futures.items()}

    def _outputs(self, rows: Sequence[Future[list[Any]]]) -> tuple[NDArray[Any], ...]:
        outputs = zip(*(row.result() for row in rows), strict=True)
        return tuple(np.concatenate(values) for values in outputs)


@contextlib.contextmanager
def device_errors_as_user_errors() -> Iterator[None]:
    """Turn an error of a run, such as full memory, into a UserError."""
    try:
        yield
    except RUN_ERRORS as error:
        raise UserError(
            f"ONNX Runtime failed ({first_line(error)}); use a smaller --batch_size, or end other "
            "processes that use the device's memory"
        ) from None


def open_graph(
    path: Path, size: int, device: str, required: Collection[str]
) -> ort.InferenceSession:
    """Open a session on a graph of this toolkit's contract. Raise UserError."""
    options = session_options(num_threads=1) if device == "cpu" else session_options()
    try:
        session = open_session(str(path), device, options)
    except NotImplemented as error:
        raise UserError(
            f"{path}: ONNX Runtime {ort.__version__} has no kernel for one of its operators in "
            f"its precision on --device {device} ({first_line(error)}); use another "
            "--precision or --device, or a newer ONNX Runtime"
        ) from None
    except LOAD_ERRORS as error:
        raise UserError(
            f"{path} does not load in ONNX Runtime ({first_line(error)}); export it again"
        ) from None
    tensors = {node.name: _as_tensor(node) for node in _nodes(session)}
    # A session computes only the outputs that it is asked for, so others do no harm.
    violation = contract_violation(tensors, size, other_outputs=True, required=required)
    if violation:
        raise UserError(f"{path} {violation}; export it again")
    return session


def result_names(session: ort.InferenceSession) -> list[str]:
    """Return the outputs of a session that are part of a batch's result, in their order."""
    present = {node.name for node in session.get_outputs()}
    return [name for name in RESULTS if name in present]


def _nodes(session: ort.InferenceSession) -> Iterable[ort.NodeArg]:
    return (*session.get_inputs(), *session.get_outputs())


def _as_tensor(node: ort.NodeArg) -> Tensor:
    """Return type and shape of an input or output; ONNX Runtime gives open sizes as names."""
    shape = tuple(size if isinstance(size, int) else None for size in node.shape)
    return Tensor(ORT_DTYPES.get(node.type, node.type), shape)


def session_options(num_threads: int | None = None) -> ort.SessionOptions:
    """Return options that give the same results on every CPU.

    Args:
        num_threads: of a session; one per core that this process may use if None.
    """
    options = _plain_options(num_threads or num_cores())
    if not int8_products_are_exact():
        options.add_session_config_entry(*EXACT_INT8)
    return options


def _plain_options(num_threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Spinning threads would take the core from other sessions, the decoder and other processes.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.intra_op_num_threads = num_threads
    return options


@cache
def int8_products_are_exact() -> bool:
    """Return whether products of uint8 and int8 are exact on this CPU without EXACT_INT8.

    With VNNI, AMX or ARM's instructions they are. The option would change no bit there, but
    ViT-Tiny and ConvNeXt-Tiny in int8 take 1.4 and 1.6 times as long with it, so it is set only
    if needed.
    """
    session = open_session(INT8_PRODUCT, "cpu", _plain_options(1))
    largest = np.full((2, 4), 255, np.uint8)
    return bool((session.run(None, {"a": largest})[0] == 4 * 255 * 127).all())


def open_session(
    graph: str | bytes, device: str, options: ort.SessionOptions
) -> ort.InferenceSession:
    """Open a session on a device without the fall-back to another one that ONNX Runtime has.

    Raises:
        UserError: the device's provider did not load.
    """
    session = ort.InferenceSession(
        graph, options, providers=PROVIDERS[device], enable_fallback=False
    )
    loaded = session.get_providers()[0]
    if loaded != _provider(device):
        raise UserError(f"ONNX Runtime fell back to {loaded}: {_provider(device)} does not load")
    return session


def _provider(device: str) -> str:
    first = PROVIDERS[device][0]
    return first if isinstance(first, str) else first[0]


def create(
    artifacts: Mapping[Fold, Path], manifests: Mapping[Fold, Mapping[str, Any]], device: str
) -> OnnxRuntimeEngine:
    """Open the sessions on `cpu` or `cuda`; all take images of one size."""
    manifest, *_ = manifests.values()
    size = manifest["preprocess"]["size"]
    return OnnxRuntimeEngine(artifacts, size, device, required_tensors(manifest))


@cache
def unavailable_reason(name: str, device: str) -> str | None:
    """Return why ONNX Runtime does not run a graph on a device, None if it has just run one."""
    if device == "cuda":
        reason = no_gpu_reason() or _cpu_build_reason()
        if reason:
            return reason
        load_cuda_libraries()
        ort.preload_dlls()  # prints which libraries are still missing
    ort.set_default_logger_severity(4)  # it would log the reason that is returned here
    try:
        session = open_session(IDENTITY, device, _plain_options(1))
        session.run(None, {"x": np.zeros(1, np.float32)})
        return None
    except UserError as error:
        cause = _loader_message() or str(error)
    except (EPFail, RuntimeException, *LOAD_ERRORS) as error:
        cause = first_line(error)
    finally:
        ort.set_default_logger_severity(2)
    return _cuda_reason(cause) if device == "cuda" else f"{cause}; {REINSTALL}"


def load_cuda_libraries() -> None:
    """Load CUDA's libraries from the packages `nvidia-*` in any folder of Python's path.

    `ort.preload_dlls` looks beside ONNX Runtime only. A bundle has that in a folder of its own, and
    torch's packages are in another one.
    """
    for name in CUDA_LIBRARIES:
        for folder in sys.path:
            found = sorted(Path(folder).glob(f"nvidia/*/lib/lib{name}.so.*"))
            for path in found:
                with contextlib.suppress(OSError):  # ONNX Runtime reports a library that is missing
                    ctypes.CDLL(str(path))
            if found:
                break


def built_for() -> str | None:
    """Return the CUDA that ONNX Runtime was built for (`13.0`), None if for none."""
    return getattr(ort, "cuda_version", None) or None


def _cpu_build_reason() -> str | None:
    """Return that this build of ONNX Runtime is for CPUs only, None if it is not.

    Both builds have one module, so the last one that was installed hides the other.
    """
    if _provider("cuda") in ort.get_available_providers():
        return None
    return (
        f"ONNX Runtime {ort.__version__} was built without CUDA; run "
        f"`pip uninstall -y onnxruntime onnxruntime-gpu`, then `{install_command(_extra())}`"
    )


def _cuda_reason(cause: str) -> str:
    """Return why CUDA's provider does not work, and the fix."""
    too_old = old_driver_reason(f"ONNX Runtime {ort.__version__}", built_for())
    if too_old:
        fix = f"run `{install_command(_extra())}`, or install {driver_for(built_for())}"
        return f"{too_old}; {fix}"
    return f"{cause}; {next(fix for part, fix in CUDA_FIXES.items() if part in cause)}"


def _extra() -> str:
    """Return the extra of this toolkit with the newest ONNX Runtime that the driver can run."""
    newest = driver_cuda()
    return "cuda12" if newest and newest.startswith("12.") else "cuda13"


def _loader_message() -> str | None:
    """Return why the library of CUDA's provider does not load, None if it does.

    ONNX Runtime only logs it. The library must not be loaded before ONNX Runtime has tried to:
    it asks for its host once, when it is loaded.
    """
    name = (
        "onnxruntime_providers_cuda.dll" if os.name == "nt" else "libonnxruntime_providers_cuda.so"
    )
    try:
        ctypes.CDLL(str(Path(ort.__file__).parent / "capi" / name))
    except OSError as error:
        return first_line(error)
    return None
