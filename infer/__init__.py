"""From engines to a submission: embeddings of every image, the GBDT ensemble, and the doctor. Runs without torch."""

import isic  # noqa: F401  switches telemetry off before a library is imported
