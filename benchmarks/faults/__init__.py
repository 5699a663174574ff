"""Campaigns of faults: broken inputs, kills and lack of resources, each judged by its outcome."""

from benchmarks.faults.run import faults

__all__ = ["faults"]
