"""The choice of formats and precisions, and the completeness of their rows."""

import re
from dataclasses import replace

import pytest
import torch

from export.formats import (
    FORMATS,
    TOLERANCES,
    ArtifactSpec,
    check_options,
    file_name,
    find_formats,
    offered_precisions,
    options_of_one_format,
)
from export.options import PlanOptions
from export.precision import TORCH_DTYPES
from export.quantize import QUANT_TYPES
from infer.formats import ENGINE_FORMATS, PRECISIONS, EngineFormat
from isic.runtime.errors import UserError
from tests.support.registries import missing_functions


def test_formats_and_precisions_are_chosen_as_asked() -> None:
    assert find_formats(("onnx", "aoti"), (), "cpu") == [("onnx", "fp32"), ("aoti", "fp32")]
    assert find_formats(("onnx", "tensorrt_rtx"), ("fp32", "fp16"), "cpu") == [
        ("onnx", "fp32"),
        ("onnx", "fp16"),
        ("tensorrt_rtx", "fp32"),
        ("tensorrt_rtx", "fp16"),
    ]
    for formats, precisions, words in (
        (("onxx",), (), 'no format "onxx", did you mean "onnx"'),
        (("onnx",), ("fp15",), 'no precision "fp15", did you mean'),
        (("aoti",), ("int8",), "aoti on cpu offers fp32, bf16, fp16"),
        (("onnx",), ("fp32", "bf16"), "bf16: onnx does not offer it here"),
        (("tensorrt_rtx",), ("int8",), "tensorrt_rtx on cuda offers fp16, bf16, fp32, fp8"),
    ):
        with pytest.raises(UserError, match=words):
            find_formats(formats, precisions, "cpu")


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """Make torch report a GPU, which this machine lacks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")


WITH_BFLOAT16 = [name for name, row in FORMATS.items() if "bf16" in row.precisions.get("cuda", ())]
"""The formats that offer bfloat16 on a GPU that has it."""


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_a_gpu_without_bfloat16_is_not_offered_it(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU is pretended."""
    pretend_gpu(monkeypatch, capability)
    for name in WITH_BFLOAT16:
        assert ("bf16" in offered_precisions(name, "cuda")) == FORMATS[name].portable
        assert offered_precisions(name, "cuda")[0] != "bf16", name
    assert find_formats(("aoti",), (), "cuda") == [("aoti", "fp16")]
    assert find_formats(("aoti",), ("bf16",), "cpu") == [("aoti", "bf16")], "a CPU has it"
    assert find_formats(("tensorrt_rtx",), ("bf16",), "cuda") == [("tensorrt_rtx", "bf16")], (
        "the plan is for other GPUs"
    )
    words = re.escape(f"8.0 (Ampere) or newer, and Tesla T4 has {capability[0]}.{capability[1]}; ")
    for formats, precisions in (
        (("aoti",), ("bf16",)),
        (("onnx", "aoti"), ("fp16", "bf16")),
        (("tensorrt",), ("bf16", "fp32")),
    ):
        with pytest.raises(UserError, match=f"^--precision bf16: .*{words}use fp16 or fp32$"):
            find_formats(formats, precisions, "cuda")


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_newer_gpus_are_offered_bfloat16(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU is pretended."""
    pretend_gpu(monkeypatch, capability)
    assert find_formats(("aoti",), (), "cuda") == [("aoti", "bf16")]
    assert all("bf16" in offered_precisions(name, "cuda") for name in WITH_BFLOAT16)


def lacks(row: EngineFormat) -> list[str]:
    """Return the missing parts of a row for export."""
    functions = ("file_name", "build")
    missing = missing_functions(row.builder, functions) if row.builder else None
    problems = [f"the builder {row.builder}"] if missing is None else missing
    if set(row.precisions) != set(row.devices):
        problems.append("precisions for each of its devices")
    for precisions in row.precisions.values():
        for precision in sorted(set(precisions) - set(TOLERANCES)):
            problems.append(f"a tolerance for {precision}")
    offered = {precision for precisions in row.precisions.values() for precision in precisions}
    if not set(row.calibrated) <= offered & set(QUANT_TYPES):
        problems.append("a quantized type for each calibrated precision")
    for option in row.options:
        if option not in PlanOptions.model_fields:
            problems.append(f"the option {option} in PlanOptions")
    return problems


@pytest.mark.parametrize("name", FORMATS)
def test_every_row_is_complete(name: str) -> None:
    assert lacks(FORMATS[name]) == []


def test_every_precision_has_a_tolerance_and_a_way_to_compute_it() -> None:
    assert tuple(TOLERANCES) == PRECISIONS
    assert set(PRECISIONS) == set(TORCH_DTYPES) | set(QUANT_TYPES)


def test_a_missing_part_of_a_row_is_reported() -> None:
    row = FORMATS["tensorrt"]
    assert lacks(replace(row, builder="export.openvino")) == ["the builder export.openvino"]
    assert lacks(replace(row, builder="export.parity")) == [
        "file_name in export.parity",
        "build in export.parity",
    ]
    assert lacks(replace(row, precisions={"cpu": ("fp16", "nf4")}, options=("x",))) == [
        "precisions for each of its devices",
        "a tolerance for nf4",
        "a quantized type for each calibrated precision",
        "the option x in PlanOptions",
    ]


@pytest.mark.parametrize(
    "spec",
    [
        ArtifactSpec("tiny", 0, "onnx", "int8", "cpu", PlanOptions()),
        ArtifactSpec("tiny", 0, "aoti", "fp32", "cpu", PlanOptions()),
        ArtifactSpec("tiny", 0, "tensorrt_rtx", "fp16", "cuda", PlanOptions()),
    ],
)
def test_file_names_have_the_suffixes_of_the_registry(spec: ArtifactSpec) -> None:
    if spec.format == "tensorrt_rtx":
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    assert file_name(spec).endswith(ENGINE_FORMATS[spec.format].suffix)


def test_file_names_have_the_precision_and_the_views() -> None:
    def name(format_name: str, precision: str, tta: str) -> str:
        return file_name(
            ArtifactSpec("tiny", 0, format_name, precision, "cpu", PlanOptions(tta=tta))
        )

    assert name("onnx", "fp32", "none") == "model.onnx"
    assert name("onnx", "fp32", "d4") == "model.d4.onnx"
    assert name("onnx", "fp16", "none") == "model.fp16.onnx"
    assert name("onnx", "fp16", "flips") == "model.fp16.flips.onnx"
    assert name("aoti", "bf16", "d4").startswith("model.bf16.d4.cpu-")
    assert name("aoti", "bf16", "none").startswith("model.bf16.cpu-")


def test_an_option_of_one_format_is_refused_without_that_format() -> None:
    assert dict(options_of_one_format()) == {
        "version_compatible": "tensorrt",
        "hardware_compatible": "tensorrt",
        "compute_capabilities": "tensorrt_rtx",
        "max_autotune": "aoti",
    }
    check_options(PlanOptions(compute_capabilities=("SM89",)), ["tensorrt", "tensorrt_rtx"])
    with pytest.raises(UserError, match="--version_compatible is for --formats tensorrt only"):
        check_options(PlanOptions(version_compatible=True), ["tensorrt_rtx"])
    with pytest.raises(UserError, match="--compute_capabilities is for --formats tensorrt_rtx"):
        check_options(PlanOptions(compute_capabilities=("SM89",)), ["tensorrt"])


@pytest.mark.parametrize(
    ("device", "options", "sizes"),
    [
        ("cpu", {}, (1, 2, 8, 16)),
        ("cuda", {"opt_batch": 4, "max_batch": 8}, (1, 2, 4, 8)),
        ("cuda", {"min_batch": 2, "opt_batch": 2, "max_batch": 2}, (2,)),
    ],
)
def test_parity_is_checked_within_the_profile(
    device: str, options: dict[str, int], sizes: tuple[int, ...]
) -> None:
    spec = ArtifactSpec("tiny", 0, "onnx", "fp32", device, PlanOptions(**options))
    assert spec.batch_sizes == sizes
