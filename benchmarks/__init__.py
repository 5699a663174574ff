"""What each step costs on this machine, measured in one run with what it is compared to."""

import isic  # noqa: F401  switches telemetry off before a library is imported
