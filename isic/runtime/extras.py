"""Optional libraries, and the extra of this package that installs each."""

from isic.runtime.errors import UserError

EXTRAS = {
    "train": ("torch", "torchvision", "timm", "albumentations"),
    "export": ("onnx", "onnxscript"),
    "tensorrt": ("tensorrt", "cuda"),
    "tensorrt_rtx": ("tensorrt_rtx",),
    "boosters": ("xgboost", "catboost"),
    "ray": ("ray",),
    "remote": ("fsspec", "s3fs"),
    "tensorboard": ("tensorboard",),
    "benchmarks": ("pandas", "PIL"),
}
"""Modules by the extra that installs them; a test compares them with setup.cfg."""


def install_command(extra: str) -> str:
    """Return the command that installs an extra."""
    return f'pip install "isic-toolkit[{extra}]"'


def missing_library(error: ModuleNotFoundError, extra: str | None = None) -> UserError | None:
    """Return the error of a missing optional library, None for any other module.

    `extra` installs all that the command needs; by default it is the library's own.
    """
    module = (error.name or "").split(".")[0]
    for name, modules in EXTRAS.items():
        if module in modules:
            return UserError(f"{module} is not installed; run `{install_command(extra or name)}`")
    return None
