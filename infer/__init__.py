"""From engines to a submission: embeddings, the ensemble of boosters, and the doctor."""

import isic  # noqa: F401  switches telemetry off before a library is imported
