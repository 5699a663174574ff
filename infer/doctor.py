"""`python -m infer doctor`: which engines run on this machine, and why the others do not."""

from infer.engines import works
from isic.config import Settings
from isic.files import versions


class DoctorSettings(Settings):
    """What `python -m infer doctor` takes: nothing."""


ENGINES = {
    "ONNX Runtime, CPU": ("onnx", "cpu"),
    "ONNX Runtime, CUDA": ("onnx", "cuda"),
    "ONNX Runtime, TensorRT": ("onnx", "tensorrt"),
    "AOTInductor, CPU": ("aoti", "cpu"),
    "AOTInductor, CUDA": ("aoti", "cuda"),
    "TensorRT": ("tensorrt", "cuda"),
    "TensorRT-RTX": ("tensorrt_rtx", "cuda"),
}
"""Each engine's format and device."""

PACKAGES = (
    "onnxruntime-gpu",
    "onnxruntime",
    "torch",
    "tensorrt",
    "tensorrt_rtx",
    "cuda-bindings",
    "lightgbm",
    "polars",
)


def doctor(settings: DoctorSettings) -> None:
    """Says which engines run on this machine, and what to install for the others."""
    for title, (name, device) in ENGINES.items():
        reason = works(name, device)
        print(f"{title:24} {'works' if reason is None else 'does not work: ' + reason}")
    for package, version in versions(*PACKAGES).items():
        print(f"{package:24} {version}")
