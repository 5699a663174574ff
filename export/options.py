"""How engines are built that are compiled for one machine: the keys of `python -m export` that builders follow."""

from collections.abc import Collection
from typing import Literal

from pydantic import Field, model_validator

from isic.runtime.config import Settings, Several
from isic.runtime.errors import UserError


class PlanOptions(Settings):
    """How engines are built that are compiled for one machine."""

    min_batch: int = Field(1, ge=1, description="TensorRT: smallest batch of the profile")
    opt_batch: int = Field(
        64, ge=1, description="TensorRT, aoti on a GPU: the batch that kernels are chosen for"
    )
    max_batch: int = Field(
        256, ge=1, description="TensorRT: largest batch of the profile; aoti: largest batch"
    )
    workspace_mib: int | None = Field(
        None,
        ge=1,
        description="TensorRT: scratch memory a layer may use, MiB; all of the GPU's if not given",
    )
    optimization_level: int = Field(
        3, ge=0, le=5, description="TensorRT: 0 builds fastest, 5 looks longest for fast kernels"
    )
    version_compatible: bool = Field(
        False,
        description="tensorrt: the plan also runs in later versions of the same major version",
    )
    hardware_compatible: bool = Field(
        False,
        description="tensorrt: the plan runs on Ampere and newer GPUs, slower than one for this GPU alone",
    )
    compute_capabilities: Several[
        Literal["SM75", "SM80", "SM86", "SM89", "SM120", "SM121", "CURRENT"]
    ] = Field(
        (),
        description="tensorrt_rtx: architectures to build for; SM86, SM89 and SM120 if not given",
    )
    max_autotune: bool = Field(False, description="aoti: look longest for fast kernels")
    calibration_images: int = Field(
        128,
        ge=1,
        description="int8 and fp8 plans: training images that show how large activations are",
    )
    cuda_graph: bool = Field(
        False,
        description="TensorRT: batches of --opt_batch run as one CUDA graph, which spares small models launches",
    )

    @model_validator(mode="after")
    def _check(self) -> "PlanOptions":
        if not self.min_batch <= self.opt_batch <= self.max_batch:
            raise ValueError(
                f"--min_batch {self.min_batch}, --opt_batch {self.opt_batch} and --max_batch {self.max_batch} must "
                "not fall"
            )
        if "CURRENT" in self.compute_capabilities and len(self.compute_capabilities) > 1:
            raise ValueError("--compute_capabilities CURRENT stands alone")
        return self

    @property
    def profile(self) -> dict[str, int]:
        return {"min": self.min_batch, "opt": self.opt_batch, "max": self.max_batch}


OPTIONS_OF = {
    "version_compatible": "tensorrt",
    "hardware_compatible": "tensorrt",
    "compute_capabilities": "tensorrt_rtx",
}
"""The options that one flavour alone has."""


def check_options(options: PlanOptions, flavours: Collection[str]) -> None:
    """Raises UserError for an option that none of the flavours to be built has."""
    for name, flavour in OPTIONS_OF.items():
        if getattr(options, name) and flavour not in flavours:
            raise UserError(
                f"--{name} is for --formats {flavour} alone; leave it out, or build that format too"
            )
