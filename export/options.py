"""Build options: the keys of `python -m export` that the builders follow."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import AliasChoices, Field, field_validator, model_validator

from infer.formats import PRECISIONS, exported_formats
from infer.trust import trust_field
from isic.layout import REMOTE_DATASET, FoldFlag, find_run
from isic.runtime.config import Name, RunName, Settings, Several
from isic.runtime.urls import Wanted
from isic.views import VIEWS, Tta
from train.config import BOOLEANS


class PlanOptions(Settings):
    """Build options: the views inside the graph, and those of formats compiled for a machine."""

    tta: Tta = Field(
        "none",
        description="test-time augmentation inside the artifact: its outputs are means over flips "
        "(4 views), or flips and quarter turns (8)",
    )
    min_batch: int = Field(1, ge=1, description="TensorRT: smallest batch size")
    opt_batch: int = Field(
        256,
        ge=1,
        description="TensorRT, and aoti on a GPU: batch size that kernels are optimized for and "
        "embedding uses; --max_batch if not given",
    )
    max_batch: int = Field(
        256,
        ge=1,
        description="TensorRT and aoti: largest batch size; divided by the number of views if not "
        "given",
    )
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

    @model_validator(mode="before")
    @classmethod
    def _divide_batches(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Divide the default batch size by the number of views: memory stays the same."""
        num_views = len(VIEWS.get(str(values.get("tta")), ("none",)))
        usual = max(1, cls.model_fields["max_batch"].default // num_views)
        largest = values.get("max_batch", usual)
        return {"max_batch": largest, "opt_batch": largest} | values

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


ONLY_MODEL = ("pretrained", "image_size", "name")
"""Keys that go with `--model` only."""


class ExportSettings(PlanOptions):
    """Export the trained folds of a config, or a backbone of timm without training.

    Each artifact must reproduce the outputs of its checkpoint, or of the backbone in torch.
    Exits with 1 if an artifact fails this parity check; it is then removed.
    """

    remote_inputs: ClassVar[Mapping[str, Wanted]] = {"data": REMOTE_DATASET}

    config: RunName | None = Field(
        None,
        min_length=1,
        validation_alias=AliasChoices("config", "model_config"),
        description="name or file of the trained config (--model_config)",
    )
    model: str | None = Field(
        None,
        min_length=1,
        description="in place of a config, the timm name of a backbone to export without training, "
        "with its features and the logits of its own classes",
    )
    pretrained: bool | str = Field(
        True,
        description="weights of --model, as in training: true (timm's for the model), a hub "
        "repository, a local file, or a folder such as fold_<k>/backbone",
    )
    image_size: int | None = Field(
        None,
        ge=8,
        le=2048,
        description="height and width of the input of --model, in pixels; the model's own if not "
        "given",
    )
    name: Name | None = Field(
        None, min_length=1, description="name of the run of --model; the model's if not given"
    )
    model_dir: Path | None = Field(
        None, description="folder of the run; outputs/<config> or outputs/<name> if not given"
    )
    fold: FoldFlag | None = Field(
        None,
        description="the only fold to export, or all: fold_all, which was trained on every row; "
        "each numbered fold that is trained if not given",
    )
    formats: Several[str] = Field(
        ("onnx",),
        validation_alias=AliasChoices("formats", "format", "engine"),
        description=f"formats to export, separated by commas: {', '.join(exported_formats())}",
    )
    precision: Several[str] = Field(
        (),
        description=f"precisions, separated by commas: {', '.join(PRECISIONS)}; the default one of "
        "each format if not given",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="device that the artifacts will run on"
    )
    data: Path | None = Field(
        None,
        description="dataset folder or URL with the images of the parity check; the training's if "
        "not given, and synthetic images for --model",
    )
    parity_images: int = Field(
        256,
        ge=1,
        description="number of held-out images in the parity check; of training images for "
        "--fold all, which holds none out, and of any images for --model",
    )
    check: bool = Field(
        False, description="check the parity of existing artifacts on this machine, build nothing"
    )
    trust: bool = trust_field()
    triton: Path | None = Field(
        None, description="folder for a model repository of NVIDIA Triton; none if not given"
    )
    force: bool = Field(False, description="export artifacts again that are up to date")

    @field_validator("pretrained", mode="before")
    @classmethod
    def _boolean_from_text(cls, value: Any) -> Any:
        return BOOLEANS.get(value.lower(), value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _config_or_model(self) -> "ExportSettings":
        if self.config and self.model:
            raise ValueError(
                "--config exports a trained run, and --model a backbone without training; "
                "give one of them"
            )
        if not (self.config or self.model):
            raise ValueError(
                "--config, the name of a trained config, or --model, a backbone of timm, is "
                "required"
            )
        if self.model:
            self._refuse_for_model()
            return self
        for flag in ONLY_MODEL:
            if flag in self.model_fields_set:
                raise ValueError(f"--{flag} is for --model; leave it out")
        return self

    def _refuse_for_model(self) -> None:
        """Raise a ValueError for a setting that a backbone cannot have."""
        if self.fold is not None:
            raise ValueError("--fold is for --config: --model has no folds; leave it out")
        if self.pretrained is False:
            raise ValueError(
                "--pretrained false: features of random weights are of no use; give true, or a "
                "file of weights"
            )

    @property
    def run_name(self) -> str:
        """The name of the run, in manifests and of its folder."""
        return self.config or self.name or str(self.model)

    @property
    def run_dir(self) -> Path:
        return find_run(self.model_dir, self.run_name)
