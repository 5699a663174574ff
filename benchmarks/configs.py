"""`python -m benchmarks configs`: image size, parameters and features of each model config."""

from pathlib import Path

from pydantic import Field

from benchmarks.record import Row, append_each
from isic.runtime.config import Settings, describe_configs
from train.config import TrainSettings, load_settings
from train.model import create_model, preprocess_spec


class ConfigsSettings(Settings):
    """Count the parameters and features of every model config, without weights or data."""

    results: Path | None = Field(
        None, description="folder of the CSV; benchmarks/results if not given"
    )


def configs(settings: ConfigsSettings) -> None:
    """Record the size of every model config."""
    append_each("configs", describe_configs(), lambda name: [describe(name)], settings.results)


def describe(name: str) -> Row:
    """Return the image size in pixels, the parameters in millions and the features of a config."""
    settings = load_settings(TrainSettings, {"config": name})
    model = create_model(settings, pretrained=False)
    return {
        "what": name,
        "network": settings.model,
        "size": preprocess_spec(settings).size,
        "parameters_m": round(sum(weight.numel() for weight in model.parameters()) / 1e6, 1),
        "features": model.num_features,
    }
