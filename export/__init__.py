"""From a fold's checkpoint to an engine that reproduces its outputs on the machine that runs it."""

import isic  # noqa: F401  switches telemetry off before a library is imported
