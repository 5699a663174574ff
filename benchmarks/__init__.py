"""Speed and scores of each step, compared with other libraries in the same run."""

import isic  # noqa: F401  switches telemetry off before a library is imported
