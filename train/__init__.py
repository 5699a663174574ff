"""Trains timm backbones on images: fold checkpoints and out-of-fold scores."""

import isic  # noqa: F401  switches telemetry off before a library is imported
