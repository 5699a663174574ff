"""`python -m benchmarks configs`: image size, parameters and features of each model config."""

from benchmarks.limits import count_work
from benchmarks.record import Row, append_each
from benchmarks.settings import ConfigsSettings
from isic.runtime.config import describe_configs
from train.config import TrainSettings, load_settings
from train.model import create_model, preprocess_spec

BATCH = 256
"""Images over which a batch's reading of the weights is divided."""


def configs(settings: ConfigsSettings) -> None:
    """Record the size of every model config."""
    append_each("configs", describe_configs(), lambda name: [config_row(name)], settings.results)


def config_row(name: str) -> Row:
    """Return a config's image size in pixels, millions of parameters, features, and its work.

    The work per image is billions of floating-point operations, and the memory traffic in
    bfloat16 at BATCH images.
    """
    settings = load_settings(TrainSettings, {"config": name})
    model = create_model(settings, pretrained=False).eval()
    size = preprocess_spec(settings).size
    work = count_work(model, size)
    return {
        "what": name,
        "network": settings.model,
        "size": size,
        "parameters_m": round(sum(weight.numel() for weight in model.parameters()) / 1e6, 1),
        "features": model.num_features,
        "gflop_per_image": round(work.flops / 1e9, 3),
        "mb_per_image": round(work.bytes_per_image("bf16", BATCH) / 1e6, 3),
    }
