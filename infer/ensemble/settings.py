"""Settings of `python -m infer fit`, `select`, `predict`, `blend`, `scores` and `compare`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import yaml
from pydantic import AliasChoices, Field, field_validator, model_validator
from pydantic.fields import FieldInfo

from infer.ensemble.boosting.libraries import DEVICE, LIBRARIES, parameters_of
from isic.layout import OUTPUT_DIR, REMOTE_DATASET, REMOTE_TABLES
from isic.runtime import yaml12
from isic.runtime.config import (
    Name,
    Settings,
    Several,
    build,
    ends_in,
    find_config,
    read_yaml,
    yaml_reason,
)
from isic.runtime.errors import did_you_mean
from isic.runtime.urls import Wanted

if TYPE_CHECKING:  # settings import no polars
    from infer.embedding.store import Embeddings

# Chosen by `python -m benchmarks hospitals` on 885 real rows of four hospitals. Change of the pAUC
# compared with no blanks, for raw and engineered features (all noise by `infer compare`):
#
# - split seeds 7, 11 and 13: 0.0000 and +0.0007 on held-out hospitals, -0.0006 and 0.0000 in
#   cross-validation;
# - split seed 42 and other seeds: +0.0011, -0.0006, +0.0010 and -0.0002.
#
# A share of 0.1 was no better. Leaving the hospital's columns out gave +0.0004, -0.0022, -0.0007
# and +0.0006 (noise), and does not help the other columns.
#
# Blanking only the hospital's columns, split seeds 7, 11 and 13, on held-out hospitals and in
# cross-validation (all noise): for raw features and six seeds 0.0000 and -0.0005 with a share of
# 0.2, -0.0015 and -0.0005 with 0.5; for engineered features and three seeds +0.0021 and -0.0004,
# +0.0026 and -0.0005.
BLANK_SHARE = 0.2
"""Share of training rows in which a category is blanked, so that boosters learn about blanks."""
NUM_FOLDS = 5
SPLIT_SEED = 42
"""The fold plan if none comes with the embeddings or the dataset."""

CHANGES = "library_settings"
"""The field behind the flags of the libraries."""
OUTPUT_NAMES = AliasChoices("output_dir", "out")

Few = Literal["warn", "refuse", "raw"]
"""How patients with few lesions are scored if scores compare lesions."""


@dataclass(frozen=True)
class EmbeddingSources:
    """The embedding runs to read; the fields are also flags and keys of the manifest."""

    embeddings: tuple["Embeddings", ...] = ()
    """Of networks whose folds' models hold the training rows out."""
    frozen: tuple["Embeddings", ...] = ()
    """Of networks that were trained on other images."""


SOURCES = tuple(field.name for field in fields(EmbeddingSources))
"""The names of the fields."""


class FitSettings(Settings):
    """Fit a GBDT ensemble and write it with its out-of-fold scores and a report."""

    remote_inputs: ClassVar[Mapping[str, Wanted]] = {"data": REMOTE_DATASET}

    config: str | None = Field(
        None,
        description="YAML file with any of these keys: a name in configs/ or a path; "
        "flags take precedence",
    )
    data: Path = Field(Path("data/isic-2024"), description="dataset folder or URL")
    features: str = Field(
        "engineered",
        description="comma-separated sets (raw, engineered, extended, image, multimodal, "
        "image_ranks, aligned, frozen, frozen_pca, frozen_distances, frozen_score), groups and "
        "features; -word leaves features out, also a network's column, as -image_score.<config>, "
        "@file names a list",
    )
    define: Several[Path] = Field(
        (),
        description="YAML files of own columns, `name: SQL expression`; a file's stem is a set",
    )
    tables: Several[str] = Field(
        (),
        description="CSV or Parquet files of own columns by isic_id, each as oof:FILE (with the "
        "rows' folds) or label_free:FILE; a file's stem is a set",
    )
    embeddings: Several[Path] = Field(
        (),
        description="outputs/embeddings/<config>, for image, multimodal, image_ranks and aligned; "
        "several networks separated by commas, the first one's folds are the boosters'",
    )
    frozen: Several[Path] = Field(
        (),
        description="for frozen, frozen_pca, frozen_distances and frozen_score: embeddings by "
        "networks that were trained on other images, separated by commas",
    )
    output_dir: Path = Field(
        OUTPUT_DIR / "ensemble",
        validation_alias=OUTPUT_NAMES,
        description="parent of the ensemble's folder",
    )
    name: Name = Field(
        "",
        description="name of the ensemble's folder; by default the features and the networks",
    )
    libraries: Several[str] = Field(("lightgbm",), description=f"some of {', '.join(LIBRARIES)}")
    weights: Several[float] = Field(
        (), description="one number per library, to weight its ranks; equal by default"
    )
    seeds: int = Field(
        3, ge=1, description="boosters per fold and library, each on its own sample of negatives"
    )
    seed: int = Field(0, ge=0, description="the first seed")
    num_folds: int | None = Field(
        None,
        ge=2,
        description=f"folds if neither embeddings nor dataset have a fold plan, {NUM_FOLDS} by "
        "default; must match the plan if there is one",
    )
    split_seed: int | None = Field(
        None,
        ge=0,
        description=f"seed of those folds, {SPLIT_SEED} by default; must match the plan if there "
        "is one",
    )
    splits: int = Field(
        1,
        ge=1,
        description="fold plans to fit, drawn with the split seed and those after it, so that "
        "compare covers the choice of the folds; predict uses the boosters of the first",
    )
    num_rounds: int | None = Field(
        None,
        ge=1,
        description="boosting rounds; each library has its own default; a library's own flag comes "
        "first, this flag before any value of the config",
    )
    negatives: float = Field(
        100.0, gt=0, allow_inf_nan=False, description="sampled negatives per positive"
    )
    image_noise: float = Field(
        0.1,
        ge=0,
        allow_inf_nan=False,
        description="standard deviation of the noise on the image scores of training rows, "
        "independent per network",
    )
    blank_share: float = Field(
        BLANK_SHARE,
        ge=0,
        lt=1,
        description="share of the training rows in which a category is blanked, per column",
    )
    refit: bool = Field(
        False,
        description="in addition, a booster per library and seed on every row, for predict --rows "
        "all; their agreement with the folds' boosters is measured and printed",
    )
    blank: Several[str] = Field(
        (), description="the categories that are blanked, such as attribution; all by default"
    )
    thin_patients: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the patients that each seed's boosters see split at random into "
        "patients of fewer lesions; the features must compare a patient's lesions",
    )
    calibrate: Literal["isotonic", "platt"] | None = Field(
        None,
        description="also fit a rising curve from out-of-fold scores to probabilities: isotonic "
        "needs some hundred malignant lesions, platt (a logistic curve) fewer; predict adds a "
        "column of them, and scores and ranks stay the same",
    )
    few_table: bool | None = Field(
        None,
        description="print the out-of-fold pAUC by number of a patient's lesions scored together; "
        "by default up to 50,000 rows, as it takes long",
    )
    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="processor of the boosters; cuda needs libraries that were built for it"
    )
    num_threads: int = Field(0, ge=0, description="threads, 0 for all cores")
    force: bool = Field(
        False, description="replace an ensemble of that name that has other settings"
    )
    library_settings: dict[str, dict[str, Any]] = Field(
        {}, description="changed settings per library; the flags are the libraries' names"
    )

    @classmethod
    def flags(cls) -> dict[str, FieldInfo]:
        """Return the flags, with one per library instead of `library_settings`."""
        others = {name: field for name, field in cls.model_fields.items() if name != CHANGES}
        help_text = (
            'changed settings of {}, such as "{{num_rounds: 100}}", over those of the config; '
            "extra: {{...}} holds any other parameter of the library"
        )
        libraries = {
            name: FieldInfo(default={}, description=help_text.format(name)) for name in LIBRARIES
        }
        return {**others, **libraries}

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, values: Any) -> Any:
        """Add the values of the config file, and gather the flags of the libraries."""
        if not isinstance(values, Mapping):
            return values
        flags = _with_changes(values)
        return cls._over_config(flags) if flags.get("config") else flags

    @classmethod
    def _over_config(cls, flags: Mapping[str, Any]) -> Any:
        path = find_config(flags["config"])
        from_file = cls._from_file(path)
        build(cls, from_file, str(path))  # on its own, so that an error names the file
        if any(name in flags for name in OUTPUT_NAMES.choices):
            # The flag may have the other name of the two.
            from_file = {k: v for k, v in from_file.items() if k not in OUTPUT_NAMES.choices}
        from_file = _with_changes(from_file)
        if flags.get("num_rounds") is not None:
            for changes in from_file.get(CHANGES, {}).values():
                changes.pop("num_rounds", None)
        return _merge(from_file, flags)

    @classmethod
    def _from_file(cls, path: Path) -> dict[str, Any]:
        return read_yaml(path)

    @field_validator("features", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        """Join the words of a list, as a config file may have one."""
        is_list = isinstance(value, list | tuple) and all(isinstance(word, str) for word in value)
        return ",".join(value) if is_list else value

    @field_validator("libraries")
    @classmethod
    def _are_known_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            _need_library(name)
        if not value or len(set(value)) < len(value):
            raise ValueError("name each library once")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "FitSettings":
        if self.weights and len(self.weights) != len(self.libraries):
            raise ValueError(
                f"--weights needs {len(self.libraries)} numbers, one per entry of --libraries"
            )
        if not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(
                "--weights must be numbers above 0; leave a library out of --libraries instead"
            )
        for name, changes in self.library_settings.items():
            _need_library(name)
            parameters_of(name, changes)
        return self

    def parameters(self, library: str) -> dict[str, Any]:
        """Return all settings of a library, the changed ones included."""
        general = {"num_rounds": self.num_rounds} if self.num_rounds else {}
        changes = {**general, **self.library_settings.get(library, {})}
        on_gpu = {DEVICE: self.device} if self.device != "cpu" else {}
        return parameters_of(library, changes) | on_gpu

    @property
    def seed_of_split(self) -> int:
        return SPLIT_SEED if self.split_seed is None else self.split_seed

    @property
    def library_weights(self) -> dict[str, float]:
        weights = self.weights or (1.0,) * len(self.libraries)
        return dict(zip(self.libraries, weights, strict=True))

    @property
    def sources(self) -> EmbeddingSources:
        return EmbeddingSources(self.embeddings, self.frozen)


class SelectSettings(FitSettings):
    """Choose features by boosters that are fitted outside each fold, and write them as a list.

    `infer fit --features @name` reads the list. The other settings are those of `infer fit`.
    """

    remote_inputs: ClassVar[Mapping[str, Wanted]] = {"data": REMOTE_TABLES}

    by: Literal["null_importance", "gain"] = Field(
        "null_importance",
        description="null_importance keeps the features with more gain than on shuffled targets; "
        "gain keeps those with the most gain",
    )
    repeats: int = Field(
        30,
        ge=1,
        description="boosters per fold and library, on shuffled targets or, with --by gain, on the "
        "true ones",
    )
    num_features: int | None = Field(
        None, ge=1, description="features to choose; by default as many as the rule keeps"
    )
    output_dir: Path = Field(
        OUTPUT_DIR / "features", validation_alias=OUTPUT_NAMES, description="folder of the list"
    )
    name: Name = Field(
        "", description="name of the list; by default the features and the rule (--by)"
    )
    output: Path | None = Field(
        None, description="file of the list, in place of --output_dir and --name"
    )
    force: bool = Field(
        False, description="replace a list of that name that was chosen with other settings"
    )

    @classmethod
    def flags(cls) -> dict[str, FieldInfo]:
        """Return the flags, without those that concern ensembles only."""
        return {name: field for name, field in super().flags().items() if name not in ONLY_FIT}

    @classmethod
    def _from_file(cls, path: Path) -> dict[str, Any]:
        # The file is one of `infer fit`: its name, folder and --force are for an ensemble.
        return {key: value for key, value in read_yaml(path).items() if key not in NOT_FOR_LISTS}

    @model_validator(mode="after")
    def _writes_one_list(self) -> "SelectSettings":
        for name in ONLY_FIT:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"--{name} is not a key of `infer select`; leave it out")
        if self.output and (self.name or "output_dir" in self.model_fields_set):
            raise ValueError("--output names the file; leave --output_dir and --name out")
        return self


ONLY_FIT = ("splits", "refit", "thin_patients", "few_table", "calibrate")
"""Flags of `infer fit` that `infer select` does not take."""
NOT_FOR_LISTS = {*ONLY_FIT, "name", "force", *OUTPUT_NAMES.choices}
"""Keys of a config of `infer fit` that `infer select` passes over."""


def _with_changes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the mappings of the libraries as parts of `library_settings`."""
    others = {key: value for key, value in values.items() if key not in LIBRARIES}
    changes = {key: _parse_changes(key, values[key]) for key in LIBRARIES if key in values}
    # If it is no mapping, the field's own validation reports it.
    if changes and isinstance(others.get(CHANGES, {}), Mapping):
        others[CHANGES] = _merge(others.get(CHANGES, {}), changes)
    return others


def _merge(low: Any, high: Any) -> Any:
    """Return a mapping with the values of another one over its own, at any depth; else `high`."""
    if not (isinstance(low, Mapping) and isinstance(high, Mapping)):
        return high
    return {**low, **{key: _merge(low.get(key), value) for key, value in high.items()}}


def _parse_changes(library: str, value: Any) -> dict[str, Any]:
    try:
        parsed = yaml12.load(value) if isinstance(value, str) else value
    except yaml.YAMLError as error:
        raise ValueError(
            f"--{library}: this is not the YAML of a mapping ({yaml_reason(error)})"
        ) from None
    if not isinstance(parsed, Mapping) or not all(isinstance(key, str) for key in parsed):
        example = '"{num_rounds: 100}"'
        raise ValueError(f"--{library} needs a mapping such as {example}, got {value!r}")
    return dict(parsed)


def _need_library(name: str) -> None:
    if name not in LIBRARIES:
        raise ValueError(f'unknown library "{name}", {did_you_mean(name, LIBRARIES)}')


class ScoreSettings(Settings):
    """Base of the settings of commands that score new rows: the ensemble, and how it scores."""

    remote_inputs: ClassVar[Mapping[str, Wanted]] = {"data": REMOTE_TABLES}

    data: Path = Field(Path("data/isic-2024"), description="dataset folder or URL")
    ensemble: Path = Field(
        OUTPUT_DIR / "ensemble",
        description="an ensemble's folder, or one with a single ensemble in it",
    )
    embeddings: Several[Path] = Field(
        (),
        description="outputs/embeddings/<config> of each network that the ensemble was fitted with",
    )
    frozen: Several[Path] = Field(
        (), description="embeddings of each frozen network that the ensemble was fitted with"
    )
    tables: Several[str] = Field(
        (), description="the ensemble's tables of own columns, with the rows to score"
    )
    few: Few = Field(
        "warn",
        description="when patients have fewer lesions than nearly all in training and features are "
        "relative to the patient; raw: score these patients by the members of a blend that have no "
        "such features, moved to the same rank among the blend's out-of-fold scores",
    )
    rows: Literal["folds", "all"] = Field(
        "folds",
        description="models that score: the mean over the folds', or those that were fitted on all "
        "rows, by fit --refit true and, for image scores, train --fold all",
    )
    prevalence: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of malignant lesions among those to score, for the probabilities of an "
        "ensemble that was fitted with --calibrate; that of the training table by default",
    )
    num_threads: int = Field(0, ge=0, description="threads, 0 for all")

    @property
    def sources(self) -> EmbeddingSources:
        return EmbeddingSources(self.embeddings, self.frozen)


HOW_TO_SCORE = ("few", "rows", "prevalence")
"""Flags of `ScoreSettings` that choose among scores of the same rows."""


class PredictSettings(ScoreSettings):
    """Score the test table with a fitted ensemble and write the submission."""

    output: Annotated[Path, ends_in(".csv")] = Field(
        Path("submission.csv"),
        validation_alias=AliasChoices("output", "out"),
        description="the submission to write",
    )


class BlendSettings(Settings):
    """Blend fitted ensembles by their ranks; the result is an ensemble's folder with copies of all.

    Example: infer blend outputs/ensemble/engineered outputs/ensemble/multimodal_demo --name final
    """

    repeated: ClassVar[str | None] = "ensembles"

    remote_inputs: ClassVar[Mapping[str, Wanted]] = {"data": REMOTE_DATASET}

    ensembles: Several[Path] = Field(
        min_length=2, description="the arguments without a key: folders of ensembles"
    )
    weights: Literal["equal", "search"] | Several[float] = Field(
        "equal",
        description="one number per ensemble, equal, or search: weights with a high out-of-fold "
        "pAUC, used if such weights, chosen for each fold on the other folds, score better than "
        "equal ones",
    )
    calibrate: Literal["isotonic", "platt"] | None = Field(
        None,
        description="also fit a rising curve from out-of-fold scores to probabilities: isotonic "
        "needs some hundred malignant lesions, platt (a logistic curve) fewer; predict adds a "
        "column of them, and scores and ranks stay the same",
    )
    output_dir: Path = Field(
        OUTPUT_DIR / "ensemble",
        validation_alias=OUTPUT_NAMES,
        description="parent of the blend's folder",
    )
    name: Name = Field("blend", min_length=1, description="name of the blend's folder")
    data: Path = Field(
        Path("data/isic-2024"),
        description="dataset folder or URL that the ensembles were fitted on",
    )
    force: bool = Field(False, description="replace an ensemble of that name")

    @field_validator("weights", mode="before")
    @classmethod
    def _word_or_numbers(cls, value: Any) -> Any:
        if value in ("equal", "search") or not isinstance(value, str):
            return value
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            raise ValueError("--weights is equal, search, or numbers such as 0.2,0.8") from None

    @model_validator(mode="after")
    def _consistent(self) -> "BlendSettings":
        if isinstance(self.weights, str):
            return self
        if len(self.weights) != len(self.ensembles):
            raise ValueError(f"--weights needs {len(self.ensembles)} numbers, one per ensemble")
        if not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError("--weights must be numbers above 0; leave an ensemble out instead")
        return self


class ScoresSettings(Settings):
    """Print the out-of-fold scores of every ensemble in a folder, the lowest pAUC first."""

    output_dir: Path = Field(
        OUTPUT_DIR / "ensemble",
        validation_alias=AliasChoices("output_dir", "out"),
        description="folder with ensembles in it",
    )


class CompareSettings(Settings):
    """Compare two ensembles: a paired test over their seeds and a bootstrap over patients.

    The seeds test the difference against chance in fitting, the bootstrap against chance in the
    choice of patients. It is called noise unless both find a difference in the same direction. With
    several training runs per side, runs are paired instead of seeds; with three or more fold plans
    that both were fitted over (fit --splits), the folds of all plans.
    """

    positional: ClassVar[tuple[str, ...]] = ("first", "second")

    remote_inputs: ClassVar[Mapping[str, Wanted]] = {"data": REMOTE_TABLES}

    first: Several[Path] = Field(
        description="first argument: an ensemble's folder, or comma-separated folders of "
        "several training runs of one recipe"
    )
    second: Several[Path] = Field(
        description="second argument: as many other folders, with the same rows and folds"
    )
    data: Path = Field(
        Path("data/isic-2024"), description="dataset folder or URL, for the patients"
    )
    draws: int = Field(1000, ge=100, description="bootstrap samples of the patients")
    seed: int = Field(0, ge=0, description="seed of the bootstrap")
