"""From a fold's checkpoint to an engine that has passed the parity gate on the machine that will run it."""

import isic  # noqa: F401  switches telemetry off before a library is imported
