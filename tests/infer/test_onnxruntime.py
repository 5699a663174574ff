"""ONNX Runtime's engine: the same int8 products on every CPU, and devices that cannot be used."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.triton import with_unsigned_weights
from infer import doctor, engines
from infer.engines import device_of, onnxruntime
from infer.engines.onnxruntime import (
    EXACT_INT8,
    IDENTITY,
    INT8_PRODUCT,
    OnnxRuntimeEngine,
    session_options,
    unavailable_reason,
)
from isic.runtime.errors import UserError

SATURATION = """
from infer.engines.onnxruntime import int8_products_are_exact, open_session, session_options, INT8_PRODUCT
import numpy as np
session = open_session(INT8_PRODUCT, "cpu", session_options(1))
print(int8_products_are_exact(), session.run(None, {"a": np.full((3, 4), 255, np.uint8)})[0].ravel())
"""


def product(depth: int, width: int, dynamic: bool) -> tuple[bytes, np.ndarray]:
    """A graph that multiplies by int8 weights of +-127, and the weights.

    With `dynamic` it takes float32 and quantizes it, as the files of `python -m export` do.
    """
    weights = np.full((depth, width), 127, np.int8)
    weights[:, ::2] = -127
    kind = TensorProto.FLOAT if dynamic else TensorProto.UINT8
    nodes = [helper.make_node("MatMulInteger", ["a", "w", "", "w_zero"], ["y"])]
    if dynamic:
        nodes[0].input[0], nodes[0].input[2] = "q", "zero"
        nodes.insert(0, helper.make_node("DynamicQuantizeLinear", ["a"], ["q", "scale", "zero"]))
    inputs = [helper.make_tensor_value_info("a", kind, ["n", depth])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.INT32, ["n", width])]
    zeros = numpy_helper.from_array(np.zeros(width, np.int8), "w_zero")
    constants = [numpy_helper.from_array(weights, "w"), zeros]
    graph = helper.make_graph(nodes, "product", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return model.SerializeToString(), weights


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 37])
def test_the_largest_int8_products_are_exact(rows: int, dynamic: bool) -> None:
    """On an x86 CPU without VNNI this fails without the option of `session_options`."""
    graph, weights = product(192, 33, dynamic)
    session = ort.InferenceSession(graph, session_options(1), providers=["CPUExecutionProvider"])
    images = np.full((rows, 192), 255, np.float32 if dynamic else np.uint8)
    expected = np.full((rows, 192), 255, np.int32) @ weights.astype(np.int32)
    np.testing.assert_array_equal(session.run(None, {"a": images})[0], expected)


@pytest.mark.parametrize("cpu", ["Haswell-v4", "Skylake-Server-v1"])
def test_cpus_without_vnni_saturate_and_the_option_helps(cpu: str) -> None:
    """QEMU's emulation of a CPU that this machine need not have."""
    if not (qemu := shutil.which("qemu-x86_64")):
        pytest.skip("qemu-user is not installed")
    ended = subprocess.run(
        [qemu, "-cpu", cpu, sys.executable, "-c", SATURATION],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stdout == "False [129540 129540 129540]\n", ended.stderr


def test_the_option_is_set_if_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "int8_products_are_exact", lambda: False)
    assert session_options().get_session_config_entry(EXACT_INT8[0]) == EXACT_INT8[1]


def test_the_option_changes_no_bit_of_what_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    if not onnxruntime.int8_products_are_exact():
        pytest.skip("without the option products saturate on this CPU")
    graph, _ = product(192, 33, dynamic=True)
    images = np.random.default_rng(0).normal(size=(5, 192)).astype(np.float32)
    outputs = []
    for exact in (True, False):
        monkeypatch.setattr(onnxruntime, "int8_products_are_exact", lambda exact=exact: exact)
        session = ort.InferenceSession(
            graph, session_options(1), providers=["CPUExecutionProvider"]
        )
        outputs.append(session.run(None, {"a": images})[0])
    np.testing.assert_array_equal(*outputs)


def test_the_graphs_that_are_tried_are_what_their_comments_say() -> None:
    for graph, operator in ((IDENTITY, "Identity"), (INT8_PRODUCT, "MatMulInteger")):
        model = onnx.load_from_string(graph)
        onnx.checker.check_model(model)
        assert [node.op_type for node in model.graph.node] == [operator]


def test_triton_gets_weights_that_are_exact_without_the_option() -> None:
    graph, _ = product(192, 33, dynamic=True)
    served = with_unsigned_weights(onnx.load_from_string(graph)).SerializeToString()
    images = np.random.default_rng(0).normal(size=(5, 192)).astype(np.float32)
    session = ort.InferenceSession(graph, session_options(1), providers=["CPUExecutionProvider"])
    plain = ort.InferenceSession(served, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(
        plain.run(None, {"a": images})[0], session.run(None, {"a": images})[0]
    )


@pytest.fixture
def broken_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU, on which CUDA's libraries are missing."""
    if engines.unavailable_reason("onnx", "cuda") is None:
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(onnxruntime, "no_gpu_reason", lambda: None)
    monkeypatch.setattr(engines, "has_gpu", lambda: True)
    for cached in (engines.usual_device, unavailable_reason):
        cached.cache_clear()


def test_a_provider_that_does_not_load_gives_the_loaders_reason(
    broken_gpu: None, capfd: pytest.CaptureFixture[str]
) -> None:
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this build of ONNX Runtime is for CPUs alone")
    reason = unavailable_reason("onnx", "cuda")
    assert reason and ".so" in reason and "cannot open shared object file" in reason
    with pytest.raises(UserError, match=r"--device cuda here: lib.*\.so.*; use --device cpu$"):
        OnnxRuntimeEngine(Path("any.onnx"), 32, "cuda")
    assert capfd.readouterr() == ("", ""), "ONNX Runtime's own log says the same in three lines"


def test_auto_falls_to_the_cpu_with_one_note(
    broken_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [device_of({"format": "onnx"}) for _ in range(3)] == ["cpu"] * 3
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("note: onnx runs on the CPU: ")
    assert device_of({"format": "onnx"}, "cuda") == "cuda", "what was asked for stays"
    assert device_of({"format": "aoti", "device": "cuda"}) == "cuda"


def test_a_machine_without_a_gpu_gets_no_note(capsys: pytest.CaptureFixture[str]) -> None:
    if engines.has_gpu():
        pytest.skip("this machine has a GPU")
    engines.usual_device.cache_clear()
    assert engines.usual_device("onnx") == "cpu" and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("import os; os.kill(os.getpid(), 11)", "does not work: it crashes with SIGSEGV"),
        ("import time; time.sleep(60)", "does not work: no answer within 1 s"),
        ("raise OSError('libnvinfer.so')", "does not work: OSError: libnvinfer.so"),
        ("print('noise'); print('works')", "works"),
    ],
)
def test_a_crash_and_a_hang_are_answers(
    code: str, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "TRIAL", code)
    assert doctor.try_engine("onnx", "cuda", seconds=1) == answer


def test_the_doctor_tries_what_it_says_works() -> None:
    assert doctor.try_engine("onnx", "cpu") == "works"
    assert doctor.try_engine("null", "cpu") == "works"
