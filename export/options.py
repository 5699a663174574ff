"""Build options: the keys of `python -m export` that the builders follow."""

from typing import Literal

from pydantic import Field, model_validator

from isic.runtime.config import Settings, Several


class PlanOptions(Settings):
    """Build options of the formats that are compiled for certain machines."""

    min_batch: int = Field(1, ge=1, description="TensorRT: smallest batch size")
    opt_batch: int = Field(
        64,
        ge=1,
        description="TensorRT, and aoti on a GPU: batch size that kernels are optimized for",
    )
    max_batch: int = Field(256, ge=1, description="TensorRT and aoti: largest batch size")
    workspace_mib: int | None = Field(
        None,
        ge=1,
        description="TensorRT: scratch memory per layer, MiB; all of the GPU's if not given",
    )
    optimization_level: int = Field(
        3, ge=0, le=5, description="TensorRT: from 0, fastest build, to 5, longest kernel search"
    )
    version_compatible: bool = Field(
        False,
        description="tensorrt: the plan also runs in later versions of the same major version",
    )
    hardware_compatible: bool = Field(
        False,
        description="tensorrt: the plan runs on all GPUs from Ampere on, slower than a plan for "
        "this GPU only",
    )
    compute_capabilities: Several[
        Literal["SM75", "SM80", "SM86", "SM89", "SM120", "SM121", "CURRENT"]
    ] = Field(
        (),
        description="tensorrt_rtx: architectures to build for; SM86, SM89 and SM120 if not given",
    )
    max_autotune: bool = Field(False, description="aoti: longest kernel search")
    calibration_images: int = Field(
        128,
        ge=1,
        description="int8 and fp8 plans: number of training images that the ranges of activations "
        "come from",
    )
    cuda_graph: bool = Field(
        False,
        description="TensorRT: run batches of --opt_batch as one CUDA graph, which saves small "
        "models the time of many kernel launches",
    )

    @model_validator(mode="after")
    def _check(self) -> "PlanOptions":
        if not self.min_batch <= self.opt_batch <= self.max_batch:
            raise ValueError(
                "need --min_batch <= --opt_batch <= --max_batch, got "
                f"{self.min_batch}, {self.opt_batch} and {self.max_batch}"
            )
        if "CURRENT" in self.compute_capabilities and len(self.compute_capabilities) > 1:
            raise ValueError("--compute_capabilities CURRENT excludes all others; give it only")
        return self

    @property
    def profile(self) -> dict[str, int]:
        """The batch sizes by TensorRT's names."""
        return {"min": self.min_batch, "opt": self.opt_batch, "max": self.max_batch}
