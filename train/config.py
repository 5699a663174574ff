"""Settings of a training run; a YAML file in `configs/` is one set of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from isic.layout import ALL, CONFIG_FILE, OUTPUT_DIR, REMOTE_DATASET, REMOTE_WEIGHTS, FoldFlag
from isic.runtime.config import (
    Settings,
    Several,
    build,
    describe_configs,
    find_config,
    is_path,
    read_config,
    read_yaml,
)
from isic.runtime.errors import UserError, did_you_mean
from isic.runtime.urls import Wanted
from train.augmentation.levels import DEVICE_LEVELS, LEVELS
from train.auxiliary import DEFAULT_WEIGHT, GRAMMAR, AuxTargets

Precision = Literal["fp32", "bf16", "fp16"]
"""The type that a network computes in; fp32 on a GPU is TF32."""
SHORTHANDS: tuple[Precision, ...] = ("fp16", "bf16")
"""Precisions that have a flag of their own."""

PIPELINE_SUFFIXES = (".yaml", ".yml", ".json")
"""Of a file with a pipeline of albumentations; JSON is YAML too."""
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class TrainSettings(Settings):
    """Train one fold or all of a config into <output_dir>/<name>/fold_<k>.

    --config (or --model_config) names a file in configs/ or a path; every key of it is a flag as
    well, and a flag takes precedence.
    """

    remote_inputs: ClassVar[Mapping[str, Wanted]] = {
        "data": REMOTE_DATASET,
        "extra_data": REMOTE_DATASET,
        "pretrained": REMOTE_WEIGHTS,
    }

    name: str = Field(
        "custom", min_length=1, description="name of the run; the config's file name if not given"
    )
    model: str = Field(description="timm name of the backbone")
    pretrained: bool | str = Field(
        True,
        description="initial weights: true (timm's for the model), false (random), a hub "
        "repository, a file or URL, or a folder such as fold_<k>/backbone or a whole run",
    )
    image_size: int = Field(
        224, ge=8, le=2048, description="height and width of the network's input, in pixels"
    )
    interpolation: Literal["linear", "cubic", "area"] = Field("linear", description="resize method")
    global_pool: Literal["avg", "max", "avgmax", "token"] | None = Field(
        None,
        description="pooling of the backbone's last feature map (token: transformers only); the "
        "model's own if not given",
    )

    data: Path = Field(
        Path("data/isic-2024"), description="dataset in the challenge's layout, a folder or URL"
    )
    extra_data: Several[Path] = Field(
        (),
        description="extra labelled dataset folders, separated by commas: trained on, never "
        "validated on",
    )
    extra_weight: float = Field(
        1.0,
        gt=0,
        description="factor on the number of rows per epoch from each extra dataset; 0.5: half of "
        "them, sampled again each epoch",
    )
    output_dir: Path = Field(OUTPUT_DIR, description="parent folder of <name>, the run's folder")
    fold: FoldFlag | None = Field(
        None,
        description="the only fold to train, or all: one network on every row, without held-out "
        "rows and a score, in fold_all; each numbered fold if not given",
    )
    num_folds: int = Field(5, ge=2, le=50, description="number of folds")
    split_seed: int = Field(42, description="seed of the assignment of patients to folds")
    seed: int = Field(
        42, ge=0, description="seed of initial weights, sampling, augmentation and dropout"
    )
    force: bool = Field(False, description="train finished folds again")
    resume: bool = Field(False, description="continue interrupted folds from their last.pth")

    max_hours: float | None = Field(
        None,
        gt=0,
        description="time limit of the command: it ends with code 75 before the first epoch that, "
        "if as long as the longest one so far, would exceed it; --resume continues",
    )

    epochs: int = Field(20, ge=1, description="number of passes over the (sampled) training rows")
    batch_size: int = Field(64, ge=1, description="images per micro-batch and process")
    accumulation_steps: int = Field(1, ge=1, description="micro-batches per optimizer step")
    lr: float = Field(1e-3, gt=0, description="peak learning rate of the head")
    lr_backbone: float = Field(1e-4, gt=0, description="peak learning rate of the backbone")
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="factor on the backbone's learning rate from each layer to the one below it",
    )
    weight_decay: float = Field(
        0.05, ge=0, description="AdamW weight decay; biases and norms are not decayed"
    )
    warmup_epochs: float = Field(
        1.0,
        ge=0,
        description="epochs of linear learning-rate warm-up, for the backbone after it is thawed; "
        "0: none",
    )
    freeze_epochs: int = Field(
        0,
        ge=0,
        description="number of first epochs that train only the head; the backbone then computes "
        "as in validation: without dropout, its batch statistics unchanged",
    )
    clip_grad: float = Field(1.0, gt=0, description="maximum norm of the gradient")
    drop_rate: float = Field(0.0, ge=0, lt=1, description="dropout rate before the head")
    drop_path_rate: float = Field(
        0.0, ge=0, lt=1, description="stochastic-depth rate of the backbone"
    )
    mixup: float = Field(
        0.0,
        ge=0,
        description="alpha of mixup's beta distribution (Zhang et al. 2018); 0: no mixup",
    )
    cutmix: float = Field(
        0.0,
        ge=0,
        description="alpha of CutMix's beta distribution (Yun et al. 2019); 0: no CutMix",
    )
    mask_weight: float = Field(
        0.0,
        ge=0,
        description="weight of the segmentation loss, for images with a mask in masks.hdf5; 0: "
        "classification only",
    )
    aux: AuxTargets = Field(
        (),
        description=f"auxiliary targets, which the network learns too: {GRAMMAR}; 1 if the column "
        "contains the text, in any case, or, without a text, if it is not blank; a column of 0 and "
        "1 is a target itself",
    )
    aux_weight: float | None = Field(
        None,
        gt=0,
        description="weight of the mean loss of the auxiliary targets; "
        f"{DEFAULT_WEIGHT} if not given",
    )
    loss: Literal["focal", "bce", "asl"] = Field(
        "focal",
        description="loss of the classes: focal (Lin et al. 2017), binary cross-entropy, or "
        "asymmetric (Ridnik et al. 2021)",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="how far targets move towards 0.5 in bce and asl; 0.1: to 0.05 and 0.95",
    )
    focal_alpha: float = Field(
        0.25, ge=0, le=1, description="weight of the positive class in the focal loss"
    )
    focal_gamma: float = Field(
        2.0, ge=0, description="focusing exponent of the focal loss; higher: easy images count less"
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of the moving average of the weights, which is validated and saved; 0: "
        "no average",
    )

    # The shorthands are not saved: settings hold the precision only.
    fp16: bool = Field(False, exclude=True, description="short for --precision fp16")
    bf16: bool = Field(False, exclude=True, description="short for --precision bf16")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        validate_default=True,
        description="type that the network computes in: fp32 (on a GPU its products are TF32, with "
        "a mantissa of 10 bits), bf16, fp16 (with loss scaling), or auto: bf16 on Ampere and newer "
        "GPUs, fp16 on Volta and Turing, else fp32; a resumed fold keeps its own",
    )
    grad_checkpointing: bool = Field(
        False,
        description="recomputation of activations in the backward pass: slower, less memory",
    )
    compile: bool = Field(False, description="compilation of the network by torch.compile")
    device: str = Field("auto", description="cuda, cuda:N, cpu, or auto (a GPU if there is one)")
    num_workers: int | None = Field(
        None,
        ge=0,
        description="loader processes; if not given, one per core with a GPU and none without; "
        "fewer if /dev/shm is too small for their batches",
    )
    cache: Literal["memory", "disk", "none"] = Field(
        "memory",
        description="place of the decoded images that a fold shows three times or more: memory, or "
        "a temporary file in the fold's folder; at most half of what is free there, and the others "
        "are decoded each time; none: all of them are",
    )
    num_threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads of torch; if neither this nor OMP_NUM_THREADS is given, measured "
        "when a fold begins; a resumed fold keeps its number, because results of different "
        "numbers differ in the last bits",
    )
    on_error: Literal["raise", "skip"] = Field(
        "raise", description="reaction to an image that is missing or does not decode"
    )
    augmentation: str | dict[str, Any] = Field(
        "light",
        description=f"augmentation of training images: {', '.join(LEVELS)}, or the .yaml or .json "
        "file of a pipeline that albumentations has saved",
    )
    augment_on: Literal["auto", "device", "workers"] = Field(
        "auto",
        description="place of augmentation: workers (one image at a time, in the loader "
        f"processes), device (a batch at a time; {' and '.join(DEVICE_LEVELS)} only), or auto: the "
        "device if it is a GPU and has the level; a resumed fold keeps its own",
    )
    use_sample: bool = Field(
        False, description="training and validation on 50,000 rows that include every positive"
    )
    negatives_per_positive: float | None = Field(
        None,
        gt=0,
        description="negatives per positive and epoch in each dataset, sampled again each epoch; "
        "all negatives if not given",
    )
    extra_negatives_per_positive: float | None = Field(
        None,
        gt=0,
        description="negatives per positive and epoch in each extra dataset; as "
        "--negatives_per_positive if not given",
    )
    positive_repeats: int = Field(
        1, ge=1, description="number of times that an epoch shows each positive, in every dataset"
    )
    positives_per_batch: int | None = Field(
        None,
        ge=1,
        description="positives in every batch of --batch_size images, repeated or dropped as "
        "needed; the number of batches and the shares of the datasets stay; if not given, batches "
        "are drawn at random",
    )
    select_epoch: Literal["last", "best"] = Field(
        "last",
        description="epoch that best_model.pth holds; `best` is chosen on the held-out fold, which "
        "makes the out-of-fold score too good",
    )
    validate_every: int | None = Field(
        None,
        ge=1,
        description="epochs from one validation on all held-out rows to the next, in addition to "
        "the last epoch; the others use a fixed subset, and `best` does not select them; if not "
        "given, as often as select_epoch needs: each epoch for `best`, the last for `last`",
    )

    @classmethod
    def help_notes(cls) -> dict[str, str]:
        return {f"--config {name}": about for name, about in describe_configs().items()}

    @model_validator(mode="before")
    @classmethod
    def _precision_of_earlier_versions(cls, values: Any) -> Any:
        # Their settings were saved without a precision: fp32 if both flags were false.
        flags = {key: values.get(key) for key in ("precision", *SHORTHANDS)}
        if flags == {"precision": None, "fp16": False, "bf16": False}:
            return {**values, "precision": "fp32"}
        return values

    @field_validator("precision")
    @classmethod
    def _precision_of_shorthand(cls, precision: str, info: ValidationInfo) -> str:
        named = [key for key in SHORTHANDS if info.data.get(key)]
        return named[0] if named and precision == "auto" else precision

    @field_validator("pretrained", mode="before")
    @classmethod
    def _boolean_from_text(cls, value: Any) -> Any:
        # A flag is text, and "false" or "no" is not the name of a model on the hub.
        return BOOLEANS.get(value.lower(), value) if isinstance(value, str) else value

    @field_validator("augmentation", mode="before")
    @classmethod
    def _augmentation_of_file(cls, value: Any) -> Any:
        # The content is a setting, so that --resume compares it and a run's config holds it.
        if not isinstance(value, str) or value in LEVELS:
            return value
        path = Path(value).expanduser()
        if path.suffix not in PIPELINE_SUFFIXES:
            raise ValueError(f"no such level, {did_you_mean(value, LEVELS)}")
        if not path.is_file():
            raise ValueError("no such file; give the path of a pipeline, or a level")
        return read_yaml(path)

    @model_validator(mode="after")
    def _consistent_run(self) -> Self:
        if self.fp16 and self.bf16:
            raise ValueError("choose one of --fp16 and --bf16")
        for key in SHORTHANDS:
            if getattr(self, key) and self.precision != key:
                raise ValueError(
                    f"--{key} contradicts --precision {self.precision}; choose one of them"
                )
        if isinstance(self.fold, int) and self.fold >= self.num_folds:
            raise ValueError(f"--fold {self.fold} is not one of 0..{self.num_folds - 1}")
        if self.fold == ALL:
            self._refuse_validation()
        if self.force and self.resume:
            raise ValueError("--force starts again and --resume continues; choose one")
        return self

    @model_validator(mode="after")
    def _consistent_recipe(self) -> Self:
        if self.freeze_epochs >= self.epochs:
            raise ValueError(
                f"--freeze_epochs {self.freeze_epochs} leaves none of the {self.epochs} epochs for "
                "the backbone"
            )
        if self.label_smoothing and self.loss == "focal":
            raise ValueError("--label_smoothing is for --loss bce and asl; set one of them, or 0")
        if self.positives_per_batch and self.positives_per_batch >= self.batch_size:
            raise ValueError(
                f"--positives_per_batch {self.positives_per_batch} leaves no negative in a batch "
                f"of {self.batch_size}; lower it"
            )
        if self.extra_negatives_per_positive and not self.extra_data:
            raise ValueError("--extra_negatives_per_positive is for --extra_data; give both")
        return self

    @model_validator(mode="after")
    def _consistent_images(self) -> Self:
        if self.augment_on == "device" and self.augmentation not in DEVICE_LEVELS:
            level = self.augmentation if isinstance(self.augmentation, str) else "of a file"
            raise ValueError(
                f"--augment_on device runs only {' and '.join(DEVICE_LEVELS)}, not --augmentation "
                f"{level}; choose one of them, or --augment_on workers"
            )
        if self.mixes_images and self.batch_size % 2:
            raise ValueError(
                f"--mixup and --cutmix pair images; make --batch_size {self.batch_size} even"
            )
        if self.mixes_images and self.mask_weight:
            raise ValueError(
                "--mixup and --cutmix would mix images but not their masks; choose them or "
                "--mask_weight"
            )
        return self

    def _refuse_validation(self) -> None:
        """Raise a ValueError for a setting that needs held-out rows."""
        if self.select_epoch == "best":
            raise ValueError(
                f"--fold {ALL} holds no row out to select an epoch on; use --select_epoch last"
            )
        if self.validate_every is not None:
            raise ValueError(
                f"--fold {ALL} holds no row out to validate on; leave --validate_every out"
            )

    @model_validator(mode="after")
    def _weighs_targets(self) -> Self:
        if self.aux_weight and not self.aux:
            raise ValueError("--aux_weight is the weight of --aux; give both")
        return self

    def validates_all(self, epoch: int) -> bool:
        """Return whether an epoch, from 1, ends with a validation on all held-out rows."""
        every = self.validate_every or (1 if self.select_epoch == "best" else self.epochs)
        return epoch == self.epochs or epoch % every == 0

    @property
    def mixes_images(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    @property
    def aux_factor(self) -> float:
        """Factor of the auxiliary loss."""
        return DEFAULT_WEIGHT if self.aux_weight is None else self.aux_weight

    @property
    def extra_ratio(self) -> float | None:
        """Negatives per positive in each extra dataset, None for all."""
        if self.extra_negatives_per_positive is None:
            return self.negatives_per_positive
        return self.extra_negatives_per_positive

    @property
    def run_dir(self) -> Path:
        return self.output_dir / self.name


def load_settings(model: type[TrainSettings], flags: Mapping[str, Any]) -> TrainSettings:
    """Build settings from flags and the YAML file that `--config` names, if any.

    `--model_config` is an older name of `--config`.
    """
    # Flags win over the file, and the file over the defaults.
    values = dict(flags)
    if is_path(str(values.get("name", ""))):  # earlier runs may have such names
        raise UserError("--name names a single folder; leave out / and ..")
    named = [values.pop(key) for key in ("config", "model_config") if key in values]
    if len(named) > 1:
        raise UserError("--config and --model_config are two names for one thing; give one")
    if not named:
        if "model" not in values and values.keys() <= model.flags().keys():
            raise UserError("give --config (`python -m train --help` lists them) or --model")
        return build(model, values)
    path = find_config(named[0])
    from_file = build_checked(model, path)
    # A run saves the default seed too; only a seed that somebody set must match the dataset's plan.
    is_default = from_file.get("split_seed") == model.model_fields["split_seed"].default
    if path.name == CONFIG_FILE and is_default:
        del from_file["split_seed"]
    if {"precision", *SHORTHANDS} & values.keys():
        from_file = without_precision(from_file)
    # A run is named after its config unless the file or a flag names it.
    return build(model, {"name": path.stem, **from_file, **values})


def build_checked(model: type[TrainSettings], path: Path) -> dict[str, Any]:
    """Read a config file and check it without the flags, so that an error names the file."""
    values = read_config(path)
    build(model, values, source=str(path))
    return values


def without_precision(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values without the keys that choose a precision."""
    return {key: values[key] for key in values if key not in {"precision", *SHORTHANDS}}
