"""Settings of `python -m isic synth`, `check`, `folds` and `import`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AliasChoices, Field, field_validator

from isic.layout import REMOTE_DATASET, TABLE_SUFFIXES
from isic.runtime.config import Settings, Several, ends_in
from isic.runtime.machine import num_cores
from isic.runtime.urls import Wanted, url_of


class SynthSettings(Settings):
    """Write a synthetic dataset in the layout of the challenge.

    The same settings give the same bytes.
    """

    output_dir: Path = Field(
        validation_alias=AliasChoices("output_dir", "out"),
        description="folder to write the dataset into",
    )
    images: int = Field(
        3_000, ge=50, le=2_000_000, description="rows and crops of the training split"
    )
    positives: int | None = Field(
        None, ge=1, description="malignant rows in the training split; by default 5 %, at most 393"
    )
    seed: int = Field(0, ge=0, description="random seed")
    test_images: int | None = Field(
        None, ge=1, le=2_000_000, description="rows and crops of the test split; by default 10 %"
    )
    pool: int | None = Field(
        None, ge=50, description="crops to render; if there are more rows, crops are reused"
    )


class CheckSettings(Settings):
    """Print a dataset's content, problems, undecodable and repeated images, and its folds."""

    remote_inputs: ClassVar[Mapping[str, Wanted]] = {"data": REMOTE_DATASET}

    data: Path = Field(description="folder or URL in the layout of the challenge")
    sample: int | None = Field(
        None, ge=1, description="decode this many images of each split instead of all"
    )
    num_folds: int = Field(
        5, ge=2, le=100, description="number of folds, also of a fold plan in the dataset"
    )
    seed: int = Field(42, ge=0, description="seed of the folds and of the sample")
    num_threads: int = Field(num_cores(), ge=1, description="decoding threads")
    against: Several[Path] = Field(
        (),
        description="folders whose images are compared with the dataset's: datasets, or any images",
    )
    output: Annotated[Path | None, ends_in(*TABLE_SUFFIXES)] = Field(
        None,
        validation_alias=AliasChoices("output", "out"),
        description="table of the images that are alike to write (.csv or .parquet)",
    )

    @field_validator("data")
    @classmethod
    def _exists(cls, value: Path) -> Path:
        if not value.is_dir() and url_of(value) is None:  # fetched later
            raise ValueError("no such folder; point it at a dataset in the challenge's layout")
        return value


class FoldsSettings(Settings):
    """Write a fold plan that holds out all rows with one value of a column together.

    Patients are never split either: values that share a patient are held out together. Training and
    `infer fit` use a plan that is in the dataset's folder. Example:
    isic folds --data D --group attribution
    """

    data: Path = Field(description="dataset folder")
    group: str = Field(description="column of the training table, such as attribution")
    num_folds: int = Field(5, ge=2, le=50, description="number of folds")
    output: Annotated[Path | None, ends_in(".parquet")] = Field(
        None,
        validation_alias=AliasChoices("output", "out"),
        description="the plan to write; folds.parquet in the dataset if not given",
    )


class ImportSettings(Settings):
    """Write a public collection in the layout of the challenge.

    The collection's archives must have been unpacked into one folder.
    """

    positional: ClassVar[tuple[str, ...]] = ("collection",)

    collection: Literal["ham10000", "isic2018", "isic2019", "isic2020", "pad_ufes_20"] = Field(
        description="collection; its name may also stand alone, without --collection"
    )
    source: Path = Field(description="folder with the collection's unpacked files")
    output_dir: Path = Field(
        validation_alias=AliasChoices("output_dir", "out"),
        description="folder to write the dataset into",
    )
