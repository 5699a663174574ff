"""Images to fold checkpoints and out-of-fold scores: a plain PyTorch AMP loop over timm backbones."""

import isic  # noqa: F401  switches telemetry off before a library is imported
