"""From an ensemble to a submission on an offline machine: make a bundle, run it."""
