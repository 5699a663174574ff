"""A trained backbone in timm's `local-dir` form, with a model card."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save

from isic.layout import ALL, BACKBONE_DIR, WEIGHTS_FILE, Fold
from isic.runtime.files import atomic_path
from train.config import TrainSettings
from train.model import Classifier
from train.pretrained import TRAINED_ON_KEY
from train.resume import in_short
from train.timm_models import backbone_options

DIGESTS = ("sha256", "tensors_sha256")
"""Digests of pretrained weights: of a file, if they are one, and of the tensors."""
LICENSE = "cc-by-nc-4.0"
"""Some sites of the challenge's dataset forbid commercial use of images, hence of weights."""
TIMM_CONFIG_FILE = "config.json"
"""Name of timm's config in a folder in its `local-dir` form."""
INTERPOLATIONS = {"linear": "bilinear", "cubic": "bicubic", "area": "box"}
"""timm's name of a resize method."""


def save_backbone(
    directory: Path, model: Classifier, settings: TrainSettings, facts: dict[str, Any]
) -> None:
    """Write a backbone for `timm.create_model("local-dir:...")`, with a model card.

    Args:
        facts: `fold`, `folds_digest`, `num_rows`, `metadata_sha256`, `pretrained`, `trained_on`
            and, unless the fold is ALL, `pauc` and `auc`.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    # Weights may be stored channels-last, and safetensors takes contiguous tensors only.
    tensors = {name: tensor.contiguous() for name, tensor in model.backbone.state_dict().items()}
    files = {
        WEIGHTS_FILE: save(tensors, {TRAINED_ON_KEY: facts[TRAINED_ON_KEY]}),
        TIMM_CONFIG_FILE: (json.dumps(timm_config(model, settings), indent=1) + "\n").encode(),
        "README.md": model_card(model, settings, facts).encode(),
    }
    for name, content in files.items():
        with atomic_path(directory / name) as temporary:
            temporary.write_bytes(content)


def timm_config(model: Classifier, settings: TrainSettings) -> dict[str, Any]:
    """Return the TIMM_CONFIG_FILE from which timm builds the backbone."""
    options = backbone_options(settings)
    spec = model.spec
    return {
        "architecture": settings.model,
        "num_classes": 0,
        "num_features": model.num_features,
        "model_args": {key: options[key] for key in options if key in {"img_size", "global_pool"}},
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [3, spec.size, spec.size],
            "mean": list(spec.mean),
            "std": list(spec.std),
            "interpolation": INTERPOLATIONS[spec.interpolation],
            "crop_pct": 1.0,
            "license": LICENSE,
        },
    }


def model_card(model: Classifier, settings: TrainSettings, facts: dict[str, Any]) -> str:
    """Return a model card of the Hugging Face hub: YAML between dashes, then Markdown."""
    name = f"{settings.name}, fold {facts['fold']}"
    has_scores = facts["fold"] != ALL
    header: dict[str, Any] = {
        "library_name": "timm",
        "license": LICENSE,
        "tags": ["image-feature-extraction", "dermatology", "timm"],
    }
    if has_scores:
        header["model-index"] = [{"name": name, "results": [result_of(facts)]}]
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# {name}

The backbone of a skin-lesion classifier: `{settings.model}` at {settings.image_size} px, \
{model.num_features} features.

```python
import timm

backbone = timm.create_model("local-dir:{BACKBONE_DIR}", pretrained=True)
```

It takes RGB scaled to [0, 1] and normalised with the mean and std in `config.json`.

## Training
- Data: {facts["num_rows"]:,} rows; metadata sha256 `{facts["metadata_sha256"]}`.
- Folds: {settings.num_folds}, grouped by patient, plan `{facts["folds_digest"]}`; \
{held_out_text(facts["fold"])}.
- {settings.epochs} epochs from {start_text(facts["pretrained"])}, seed {settings.seed}, \
augmentation `{in_short(settings.augmentation)}`.

{scores_text(facts)}
## Licence and limits
The images of several sites of the challenge's dataset are CC-BY-NC; for another dataset \
put its own licence here.
{"The scores are those of one dataset. " * has_scores}This is no medical device.
"""


def result_of(facts: dict[str, Any]) -> dict[str, Any]:
    """Return an entry of the hub's `model-index`."""
    metrics = [
        {"type": kind, "value": round(facts[kind], 4), "name": kind} for kind in ("pauc", "auc")
    ]
    return {
        "task": {"type": "image-classification", "name": "malignant or benign skin lesion"},
        "dataset": {"type": "isic-2024", "name": "ISIC 2024 (SLICE-3D)"},
        "metrics": metrics,
    }


def start_text(started_from: Mapping[str, str]) -> str:
    """Return the card's words on the weights that training started from."""
    if started_from["source"] == "random":
        return "random weights"
    digests = [f"{key} `{started_from[key]}`" for key in DIGESTS if key in started_from]
    source = started_from["source"]
    weights = "timm's weights" if source == "timm" else f"the weights `{source}`"
    return f"{weights} ({', '.join(digests)})"


def held_out_text(fold: Fold) -> str:
    return "none was held out" if fold == ALL else f"fold {fold} was held out"


def scores_text(facts: dict[str, Any]) -> str:
    """Return the card's section on scores."""
    if facts["fold"] == ALL:
        return "## Scores\nNone: every row was trained on.\n"
    return f"""## Scores on the held-out fold
| pAUC above 80 % TPR (0 to 0.2) | AUC |
|---|---|
| {facts["pauc"]:.4f} | {facts["auc"]:.4f} |
"""
