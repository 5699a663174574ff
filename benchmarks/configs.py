"""`python -m benchmarks configs`: image size, parameters and features of each model config."""

from benchmarks.record import Row, append_each
from benchmarks.settings import ConfigsSettings
from isic.runtime.config import describe_configs
from train.config import TrainSettings, load_settings
from train.model import create_model, preprocess_spec


def configs(settings: ConfigsSettings) -> None:
    """Record the size of every model config."""
    append_each("configs", describe_configs(), lambda name: [config_row(name)], settings.results)


def config_row(name: str) -> Row:
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
