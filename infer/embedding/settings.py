"""The settings of `python -m infer embed`."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import AliasChoices, Field, model_validator

from infer.formats import AUTO, ENGINE_FORMATS, Precision, exported_formats
from infer.trust import trust_field
from isic.layout import ALL, EMBEDDINGS_DIR, REMOTE_DATASET, find_embeddings
from isic.runtime.config import RunName, Settings
from isic.runtime.urls import Wanted
from isic.views import Tta

DecodeIn = Literal["auto", "threads", "processes"]
# ONNX Runtime splits a batch into images, one per core: several for each core of a large CPU.
BATCH_CPU = 64
BATCH_GPU = 256
"""Enough images to fill a GPU."""


class EmbedSettings(Settings):
    """Embed the dataset's images with the exported folds of a model config, or with a backbone.

    Existing shards are kept, so the same command resumes an interrupted run.
    """

    remote_inputs: ClassVar[Mapping[str, Wanted]] = {"data": REMOTE_DATASET}
    remote_outputs: ClassVar[tuple[str, ...]] = ("output_dir",)

    config: RunName = Field(
        validation_alias=AliasChoices("config", "model_config"),
        description="name or file of the model config (or --model_config)",
    )
    data: Path = Field(
        Path("data/isic-2024"), description="dataset in the challenge's layout, a folder or URL"
    )
    images: Path | None = Field(
        None,
        description="any images in place of a dataset: a folder, or a list (.csv or .parquet) with "
        "the column path and, if wanted, isic_id; every fold embeds every image, into "
        "<config>/images",
    )
    model_dir: Path | None = Field(
        None, description="training run with exported folds; outputs/<config> by default"
    )
    output_dir: Path = Field(
        EMBEDDINGS_DIR,
        validation_alias=AliasChoices("output_dir", "out"),
        description="parent of the embeddings' folder, which is named <config>; a folder or URL",
    )
    split: Literal["train", "test", "all"] = Field(
        "all",
        description="images to embed; all: every split in the dataset, or with --fold all the test "
        "split only",
    )
    fold: Literal["all"] | None = Field(
        None,
        description="all: use fold_all, which was trained on every row, and write <config>_all: "
        "the test images, or with --split train those of another dataset; if not given, "
        "each numbered fold",
    )
    folds: Literal["oof", "all"] = Field(
        "oof",
        description="models per train image: the fold that held it out, or all; a test image is "
        "always embedded by all",
    )
    tta: Tta = Field(
        "none",
        description="test-time augmentation: average over flips (4 views), or flips and quarter "
        "turns (8)",
    )
    format: str = Field(
        AUTO,
        validation_alias=AliasChoices("format", "engine"),
        description="exported artifact of each fold: a file name, a format "
        f"({', '.join(exported_formats())}), or auto, the one that this machine is best at",
    )
    precision: Precision | None = Field(
        None, description="precision of the artifact; any, but int8 and fp8 only if they are named"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="device of the engines; auto: a GPU if one can be used"
    )
    dtype: Literal["float16", "float32"] = Field("float16", description="type of stored features")
    batch_size: int | None = Field(
        None,
        ge=1,
        description=f"images per engine call; {BATCH_CPU} on a CPU, {BATCH_GPU} on a GPU by "
        "default",
    )
    num_threads: int | None = Field(
        None, ge=1, description="decoding threads per process; one per core by default"
    )
    decode_in: DecodeIn = Field(
        "auto",
        description="what decodes: threads, or processes, which do not slow a GPU's own thread; "
        "auto: processes with a GPU and at least four cores",
    )
    depth: int | None = Field(
        None, ge=1, description="batches decoded ahead; enough to keep all decoders busy by default"
    )
    num_processes: int = Field(
        1, ge=1, description="processes on this machine, each with its own GPU and cores"
    )
    ray: str | None = Field(
        None, description="address of a Ray cluster, or local; runs one actor per GPU"
    )
    on_error: Literal["raise", "skip"] = Field(
        "skip", description="whether a missing or unreadable image stops the run"
    )
    max_bad: float = Field(
        0.01, ge=0, le=1, description="share of skipped images above which the run stops"
    )
    quiet: bool = Field(False, description="hide the progress bar")
    trust: bool = trust_field()
    force: bool = Field(
        False, description="replace embeddings that were made with other models, data or settings"
    )

    @property
    def run_dir(self) -> Path:
        return find_embeddings(self.output_dir, self.config, self.fold)

    @model_validator(mode="after")
    def _consistent(self) -> "EmbedSettings":
        if self.ray and self.num_processes > 1:
            raise ValueError("--ray sets the number of processes; leave out --num_processes")
        if self.fold == ALL and self.folds == "all":
            raise ValueError(
                f"--folds chooses among numbered folds; leave it out with --fold {ALL}"
            )
        others = self.model_fields_set & {"data", "split", "folds"}
        if self.images and others:
            flags = " and ".join(f"--{key}" for key in sorted(others))
            raise ValueError(f"--images takes the place of a dataset; leave out {flags}")
        if self.precision and self.format not in (AUTO, *ENGINE_FORMATS):
            raise ValueError(
                "--precision chooses among the artifacts of a format; "
                f"add --format onnx, not {self.format}"
            )
        return self
