"""Settings of a training run. One YAML file in `configs/` is one set of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from isic.runtime.config import Settings, Several, build, describe_configs, find_config, read_config
from isic.runtime.errors import UserError

TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class TrainSettings(Settings):
    """What `python -m train` takes. Precedence: these defaults < the YAML file < flags."""

    name: str = Field(
        "custom", min_length=1, description="name of the run; the config's file name unless given"
    )
    model: str = Field(description="timm name of the backbone")
    pretrained: bool | str = Field(
        True,
        description="true: timm's weights for the model; a hub name; a local file of weights or a folder such as "
        "fold_<k>/backbone; false: random",
    )
    image_size: int = Field(224, ge=8, le=2048, description="side of the square input, pixels")
    interpolation: Literal["linear", "cubic", "area"] = Field("linear", description="resize method")
    global_pool: Literal["avg", "max", "avgmax", "token"] | None = Field(
        None,
        description="how the backbone pools its last map (token: transformers only); its own way if not given",
    )

    data: Path = Field(
        Path("data/isic-2024"), description="dataset folder in the challenge's layout"
    )
    extra_data: Several[Path] = Field(
        (),
        description="further labelled dataset folders, commas between them: trained on, never validated on",
    )
    extra_weight: float = Field(
        1.0,
        gt=0,
        description="factor of the rows that an epoch shows of each extra dataset; 0.5: half of them, redrawn",
    )
    output_dir: Path = Field(Path("outputs"), description="the run lands in <output_dir>/<name>")
    fold: int | None = Field(
        None, ge=0, description="train this fold alone; all folds if not given"
    )
    num_folds: int = Field(5, ge=2, le=50, description="number of folds")
    split_seed: int = Field(42, description="seed of the fold plan")
    seed: int = Field(42, ge=0, description="seed of everything random in training")
    force: bool = Field(False, description="train finished folds again")
    resume: bool = Field(False, description="go on from last.pth where a fold was interrupted")

    epochs: int = Field(20, ge=1, description="passes over the (sampled) training rows")
    batch_size: int = Field(64, ge=1, description="images a micro-batch, in each process")
    accumulation_steps: int = Field(1, ge=1, description="micro-batches an optimizer step")
    lr: float = Field(1e-3, gt=0, description="peak learning rate of the head")
    lr_backbone: float = Field(1e-4, gt=0, description="peak learning rate of the backbone")
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="factor of the backbone's learning rate from each layer to the one below it",
    )
    weight_decay: float = Field(0.05, ge=0, description="AdamW weight decay of matrices")
    warmup_epochs: float = Field(
        1.0,
        ge=0,
        description="linear warm-up of the learning rate, of the backbone's from the epoch in which it is thawed; "
        "0: none",
    )
    freeze_epochs: int = Field(0, ge=0, description="first epochs in which only the head learns")
    clip_grad: float = Field(1.0, gt=0, description="largest norm of the gradient")
    drop_rate: float = Field(0.0, ge=0, lt=1, description="dropout before the head")
    drop_path_rate: float = Field(0.0, ge=0, lt=1, description="stochastic depth of the backbone")
    mixup: float = Field(
        0.0, ge=0, description="mixup: alpha of the beta distribution (Zhang et al. 2018); 0: none"
    )
    cutmix: float = Field(
        0.0, ge=0, description="cutmix: alpha of the beta distribution (Yun et al. 2019); 0: none"
    )
    mask_weight: float = Field(
        0.0,
        ge=0,
        description="weight of the segmentation loss where masks.hdf5 has a mask; 0: classification alone",
    )
    focal_alpha: float = Field(
        0.25, ge=0, le=1, description="focal loss: weight of the positive class"
    )
    focal_gamma: float = Field(
        2.0, ge=0, description="focal loss: how far easy examples are discounted"
    )
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="moving average of the weights, validated and saved; 0: none"
    )

    fp16: bool = Field(False, description="autocast to float16 with loss scaling")
    bf16: bool = Field(False, description="autocast to bfloat16")
    grad_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory"
    )
    compile: bool = Field(False, description="torch.compile the model")
    device: str = Field("auto", description="cuda, cpu, or auto")
    num_workers: int | None = Field(
        None,
        ge=0,
        description="processes that decode and augment; if not given, one per core with a GPU, else none; fewer if "
        "/dev/shm is too small for their batches",
    )

    num_threads: int | None = Field(
        None,
        ge=1,
        description="threads that torch computes with on a CPU; measured when a fold begins if neither this nor "
        "OMP_NUM_THREADS is given; results of different numbers differ in the last bits, so a resumed fold keeps its "
        "own",
    )
    on_error: Literal["raise", "skip"] = Field(
        "raise", description="an image that is absent or does not decode"
    )
    augmentation: Literal["none", "light", "medium", "heavy"] = Field(
        "light", description="strength of augmentation"
    )
    use_sample: bool = Field(
        False, description="train and validate on 50,000 rows that keep every positive"
    )
    negatives_per_positive: float | None = Field(
        None,
        gt=0,
        description="negatives drawn anew each epoch for one positive, in each dataset for its own positives; "
        "all of them if not given",
    )
    positive_repeats: int = Field(
        1, ge=1, description="how often an epoch shows each positive, in every dataset"
    )
    select_epoch: Literal["last", "best"] = Field(
        "last",
        description="which epoch best_model.pth holds; `best` picks it on the held-out fold, which flatters the "
        "out-of-fold score",
    )

    @classmethod
    def help_notes(cls) -> dict[str, str]:
        return {f"--config {name}": about for name, about in describe_configs().items()}

    @field_validator("pretrained", mode="before")
    @classmethod
    def _truth_from_text(cls, value: Any) -> Any:
        """A flag is text, and "false" or "no" is not the name of a model on the hub."""
        return TRUTH.get(value.lower(), value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.fp16 and self.bf16:
            raise ValueError("choose one of --fp16 and --bf16")
        if self.fold is not None and self.fold >= self.num_folds:
            raise ValueError(f"--fold {self.fold} is not one of 0..{self.num_folds - 1}")
        if self.force and self.resume:
            raise ValueError("--force trains afresh and --resume goes on; choose one")
        if self.freeze_epochs >= self.epochs:
            raise ValueError(
                f"--freeze_epochs {self.freeze_epochs} leaves none of {self.epochs} epochs for the backbone"
            )
        if self.mixes and self.batch_size % 2:
            raise ValueError(
                f"--mixup and --cutmix pair images; make --batch_size {self.batch_size} even"
            )
        if self.mixes and self.mask_weight:
            raise ValueError(
                "--mixup and --cutmix would mix images but not their masks; choose them or --mask_weight"
            )
        return self

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def run_dir(self) -> Path:
        return self.output_dir / self.name

    def fold_dir(self, fold: int) -> Path:
        return self.run_dir / f"fold_{fold}"


def load_settings(model: type[TrainSettings], flags: Mapping[str, Any]) -> TrainSettings:
    """Builds the settings from a config's YAML file and flags; `--model_config` is an older name of `--config`."""
    values = dict(flags)
    named = [values.pop(key) for key in ("config", "model_config") if key in values]
    if len(named) > 1:
        raise UserError("--config and --model_config are two names for one thing; give one")
    if not named:
        return build(model, values)
    path = find_config(named[0])
    from_file = build_checked(model, path)
    return build(model, {"name": path.stem, **from_file, **values})


def build_checked(model: type[TrainSettings], path: Path) -> dict[str, Any]:
    """Reads a config file, its keys and values checked by themselves so that an error names the file."""
    values = read_config(path)
    build(model, values, source=str(path))
    return values
