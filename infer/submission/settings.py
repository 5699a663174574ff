"""The settings of `python -m infer bundle` and `python -m infer submit`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, model_validator

from infer.formats import Precision, exported_formats
from isic.layout import OUTPUT_DIR
from isic.runtime.config import Settings, Several, ends_in
from isic.runtime.installed import PLATFORMS, this_python

Cuda = Literal["12", "13", "none"]


class BundleSettings(Settings):
    """Write a folder with all that an offline machine needs to submit, and test it.

    It holds the ensemble, the exported networks that it was fitted with, an ensemble of tables to
    fall back on, the code and its packages, `submit.py`, and a notebook with its metadata.
    """

    ensemble: Path = Field(description="folder of the ensemble or the blend")
    output_dir: Path = Field(
        validation_alias=AliasChoices("output_dir", "out"),
        description="folder to write, which must not exist",
    )
    runs: Path = Field(OUTPUT_DIR, description="parent of the runs with the exported networks")
    fallback: Several[Path] = Field(
        (),
        description="ensembles that need fewer networks, for when images or time run out; by "
        "default the members of a blend, and the best ensemble without images in the same folder",
    )
    rows: Literal["folds", "all"] = Field(
        "folds", description="models that score, as in predict --rows"
    )
    few: Literal["warn", "raw"] = Field(
        "warn", description="scores of patients with few lesions, as in predict --few"
    )
    format: Several[str] = Field(
        ("onnx",), description=f"formats of the networks: {', '.join(exported_formats())}"
    )
    precision: Several[Precision] = Field(
        (),
        description="precisions of the networks, such as fp16,int8; on a CPU int8 is used if it is "
        "there; by default all but int8 and fp8 that are exported",
    )
    python: str = Field(
        this_python(), pattern=r"^3\.\d+$", description="Python version of the machine"
    )
    cuda: Cuda = Field("none", description="CUDA of the machine's GPUs; none: CPU only")
    platform: Several[str] = Field(PLATFORMS, description="platform tags of the machine")
    packages: bool = Field(
        True, description="add the packages; false if the machine has them installed"
    )
    cuda_libraries: bool = Field(
        False,
        description="add CUDA's libraries, several GB; without them the machine's own are used, "
        "such as those of its PyTorch",
    )
    data: Path | None = Field(
        None,
        description="dataset whose first test rows are also submitted in the test of the bundle; "
        "synthetic rows are always, unless an own column is read, which they lack",
    )
    test: bool = Field(True, description="run the bundle before it gets its name")
    owner: str = Field(
        "OWNER", description="user name on Kaggle, for the metadata of dataset and notebook"
    )
    title: str = Field(
        "ISIC 2024 bundle", min_length=6, max_length=50, description="title on Kaggle"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "BundleSettings":
        if self.cuda_libraries and (self.cuda == "none" or not self.packages):
            raise ValueError("--cuda_libraries needs --cuda 12 or 13, and --packages true")
        return self


class SubmitSettings(Settings):
    """Write a submission with a bundle: by tables first, and by images when they are done.

    Networks that fail, or that would not end in time, are left out with a warning. The same command
    resumes an interrupted run.
    """

    bundle: Path = Field(description="folder that `infer bundle` wrote")
    data: Path | None = Field(
        None,
        description="dataset folder; if not given, the only folder with a test table in --input",
    )
    input: Path = Field(
        Path("/kaggle/input"), description="folder in which the dataset is looked for"
    )
    output: Annotated[Path, ends_in(".csv")] = Field(
        Path("submission.csv"),
        validation_alias=AliasChoices("output", "out"),
        description="the submission to write",
    )
    work: Path | None = Field(
        None,
        description="folder for embeddings, from which a run resumes; submission_work beside the "
        "submission if not given",
    )
    keep: bool = Field(False, description="keep the embeddings; removed at the end by default")
    hours: float | None = Field(
        None, gt=0, description="time limit: networks that would exceed it are left out"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="device of the networks; auto: every GPU that runs them, else the CPU"
    )
    strict: bool = Field(
        False, description="end with an error if a GPU, a network or an image cannot be used"
    )
    num_threads: int | None = Field(None, ge=1, description="threads; one per core if not given")
    quiet: bool = Field(False, description="hide the progress bar")
