"""The domain of the ISIC 2024 challenge: tables, images, folds, features and metrics."""

import os

__version__ = "0.1.0"

# Every package of this toolkit imports `isic` first, so that no library can be imported before. A
# value that the user has set stays.
NO_TELEMETRY = {
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime: events to Microsoft, and a device id in ~/.cache
    "NO_ALBUMENTATIONS_UPDATE": "1",  # albumentations asks PyPI for a newer version on import
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""Variables that turn off the telemetry of libraries, each read when its library is imported."""

for _name, _value in NO_TELEMETRY.items():
    os.environ.setdefault(_name, _value)
