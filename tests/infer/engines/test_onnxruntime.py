"""ONNX Runtime's engine: the contract, equal int8 products on every CPU, and absent devices."""

import gc
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

from export.triton import with_unsigned_weights
from infer.engines import create, onnxruntime
from infer.engines.contract import FEATURES, LOGITS
from infer.engines.onnxruntime import (
    EXACT_INT8,
    IDENTITY,
    INT8_PRODUCT,
    OnnxRuntimeEngine,
    session_options,
    unavailable_reason,
)
from isic.layout import ONNX_FILE, fold_dir
from isic.runtime.errors import UserError
from tests.support import fake_driver
from tests.support.networks import POINTWISE, build_engine, network, spec_of

SATURATION = """
import numpy as np
from infer.engines.onnxruntime import INT8_PRODUCT, int8_products_are_exact
from infer.engines.onnxruntime import open_session, session_options
session = open_session(INT8_PRODUCT, "cpu", session_options(1))
largest = np.full((3, 4), 255, np.uint8)
print(int8_products_are_exact(), session.run(None, {"a": largest})[0].ravel())
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


@pytest.fixture(scope="module")
def engine(exported: Path) -> Iterator[OnnxRuntimeEngine]:
    """The engine of two folds."""
    artifacts = {fold: fold_dir(exported, fold) / ONNX_FILE for fold in (0, 1)}
    opened = OnnxRuntimeEngine(artifacts, 32, "cpu")
    yield opened
    opened.close()


def noise(number: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (number, 32, 32, 3), np.uint8)


def test_batches_in_flight_keep_their_own_results(engine: OnnxRuntimeEngine) -> None:
    """Collected in any order, from the folds that were asked for."""
    batches = [noise(number, number) for number in (1, 3, 2, 5)]
    folds = [(0, 1), (1,), (0,), (0, 1)]
    pendings = [engine.submit(*given) for given in zip(batches, folds, strict=True)]
    for number in (2, 0, 3, 1):
        results = pendings[number].result()
        assert tuple(results) == folds[number]
        for fold, (features, logits) in results.items():
            again = engine.submit(batches[number][:1], [fold]).result()[fold]
            np.testing.assert_array_equal(features[:1], again[0])
            np.testing.assert_array_equal(logits[:1], again[1])
            assert features.shape == (len(batches[number]), engine_width(engine))
    assert not np.array_equal(*(pendings[0].result()[fold][0] for fold in (0, 1)))


def engine_width(engine: OnnxRuntimeEngine) -> int:
    return int(engine.submit(noise(1), [0]).result()[0][0].shape[1])


def test_a_batch_bound_to_a_device_gives_the_same(engine: OnnxRuntimeEngine) -> None:
    """The way through a GPU, here with bindings to the CPU's memory."""
    images = noise(5)
    bound = engine._run_batch(dict.fromkeys((0, 1), (FEATURES, LOGITS)), images)
    for fold, outputs in engine.submit(images).result().items():
        for expected, found in zip(outputs, bound[fold], strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_error_of_a_run_is_one_sentence(
    engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def run(self, *arguments: object) -> None:
            raise RuntimeException("Available memory of 1 is smaller than requested bytes\nat X")

        io_binding = run

    monkeypatch.setattr(engine, "_sessions", {0: Full()})
    message = (
        r"^ONNX Runtime failed \(Available memory [^\n]* bytes\); use a smaller --batch_size, "
    )
    with pytest.raises(UserError, match=message):
        engine.submit(noise(2), [0]).result()
    with pytest.raises(UserError, match=message):
        engine._run_batch({0: (FEATURES,)}, noise(2))


def test_an_error_of_a_bound_run_is_one_sentence(engine: OnnxRuntimeEngine) -> None:
    """It has another type than that of a run without bindings."""
    with pytest.raises(
        UserError, match=r"^ONNX Runtime failed \(Error in execution: [^\n]*\); use"
    ):
        engine._run_batch({0: (FEATURES,)}, noise(2)[:, :16])


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


def test_a_provider_that_does_not_load_gives_the_loaders_reason(
    broken_gpu: None, capfd: pytest.CaptureFixture[str]
) -> None:
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this build of ONNX Runtime is for CPUs only")
    reason = unavailable_reason("onnx", "cuda")
    assert reason
    assert ".so" in reason
    assert "cannot open shared object file" in reason
    assert reason.endswith('; run `pip install "onnxruntime-gpu[cuda,cudnn]"`')
    with pytest.raises(UserError, match=r"--device cuda here: lib.*\.so.*, or use --device cpu$"):
        OnnxRuntimeEngine({0: Path("any.onnx")}, 32, "cuda")
    assert capfd.readouterr() == ("", ""), "ONNX Runtime's own log of the same error is silenced"


LOADED = """
from infer.engines.onnxruntime import ort, unavailable_reason
unavailable_reason("onnx", "cuda")
print(ort.__file__, open("/proc/self/maps").read())
"""


def test_the_cuda_libraries_of_another_folder_than_onnx_runtimes_are_found(tmp_path: Path) -> None:
    """As in a bundle, whose packages are not beside those of the machine's PyTorch."""
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this build of ONNX Runtime is for CPUs only")
    bundled, machine = tmp_path / "site", tmp_path / "dist-packages"
    library = machine / "nvidia" / "cublas" / "lib" / "libcublasLt.so.99"
    for folder in (bundled, library.parent, tmp_path / "driver"):
        folder.mkdir(parents=True)
    (bundled / "onnxruntime").symlink_to(Path(ort.__file__).parent)
    environment = fake_driver.install(tmp_path / "driver")
    shutil.copyfile(tmp_path / "driver" / "libcuda.so.1", library)
    path = os.pathsep.join(map(str, (bundled, machine, Path.cwd())))
    ended = subprocess.run(
        [sys.executable, "-c", LOADED],
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(bundled) in ended.stdout
    assert str(library) in ended.stdout


@pytest.mark.parametrize(
    ("driver", "extra"), [("12.6", "cuda12"), ("13.0", "cuda13"), (None, "cuda13")]
)
def test_a_build_for_cpus_is_replaced_by_one_that_the_driver_can_run(
    broken_gpu: None, driver: str | None, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "driver_cuda", lambda: driver)
    reason = str(unavailable_reason("onnx", "cuda"))
    unavailable_reason.cache_clear()
    assert reason == (
        f"ONNX Runtime {ort.__version__} was built without CUDA; run "
        "`pip uninstall -y onnxruntime onnxruntime-gpu`, then "
        f'`pip install "isic-toolkit[{extra}]"`'
    )


@pytest.mark.parametrize(
    ("cause", "fix"),
    [
        ("libcudnn.so.9: cannot open shared object file", "onnxruntime-gpu[cuda,cudnn]"),
        ("no kernel image is available for execution", "isic-toolkit[cuda12]"),
        ("CUDA failure 2: out of memory; GPU=0", "end other processes"),
        ("CUDA failure 999: unknown error; GPU=0", "https://onnxruntime.ai/"),
    ],
)
def test_an_error_of_the_provider_has_its_fix(cause: str, fix: str) -> None:
    found, _, command = onnxruntime._cuda_reason(cause).rpartition("; ")
    assert found == cause
    assert fix in command


@pytest.mark.slow
def test_an_engine_is_freed_once_nobody_holds_it(tmp_path: Path) -> None:
    model, reference = network(POINTWISE)
    engine = build_engine(model, spec_of(POINTWISE, "onnx", "fp32"), tmp_path)
    engine.run(reference.images)
    gc.disable()  # a session must not wait for the garbage collector
    try:
        held = weakref.ref(engine)
        del engine
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_vit3", "test_convnext3"])
def test_an_operator_without_a_kernel_is_named(name: str, tmp_path: Path) -> None:
    """The graph is valid, but ONNX Runtime has no convolution in bfloat16 on a CPU.

    Older versions lack other kernels on CUDA.
    """
    words = (
        r"has no kernel for one of its operators .*NOT_IMPLEMENTED.*Conv.*use another --precision"
    )
    with pytest.raises(UserError, match=words) as raised:
        build_engine(network(name)[0], spec_of(name, "onnx", "bf16"), tmp_path)
    assert "export it again" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_graph_of_another_contract_is_refused(tmp_path: Path) -> None:
    def save(dtype: int, output: str, side: int) -> Path:
        value = helper.make_tensor_value_info
        nodes = [
            helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0),
            helper.make_node("Identity", ["y"], [output]),
            helper.make_node("ReduceMean", ["y"], ["logits"], axes=[1], keepdims=1),
        ]
        inputs = [value("images", dtype, ["n", side, side, 3])]
        outputs = [
            value(output, TensorProto.FLOAT, ["n", side]),
            value("logits", TensorProto.FLOAT, ["n", 1]),
        ]
        graph = helper.make_graph(nodes, "g", inputs, outputs)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(model, tmp_path / "model.onnx")
        return tmp_path / "model.onnx"

    manifest = {"format": "onnx", "preprocess": {"size": 8}}
    assert create(save(TensorProto.UINT8, "features", 8), manifest, "cpu").run(
        np.zeros((2, 8, 8, 3), np.uint8)
    )
    for path, words in (
        ((TensorProto.FLOAT, "features", 8), r"has images float32 \[N, 8, 8, 3\], not uint8"),
        (
            (TensorProto.UINT8, "embedding", 8),
            "has images, embedding, logits, not images, features, logits",
        ),
        (
            (TensorProto.UINT8, "features", 9),
            r"has images uint8 \[N, 9, 9, 3\], not uint8 \[N, 8, 8, 3\]",
        ),
    ):
        with pytest.raises(UserError, match=words):
            create(save(*path), manifest, "cpu")
    (tmp_path / "model.onnx").write_bytes(b"no protobuf")
    with pytest.raises(UserError, match="does not load in ONNX Runtime"):
        create(tmp_path / "model.onnx", manifest, "cpu")
    with pytest.raises(UserError, match='no engine runs the format "caffe"'):
        create(tmp_path / "model.onnx", {"format": "caffe"}, "cpu")
