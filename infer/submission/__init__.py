"""From an ensemble to a submission on a machine without a network: make a bundle, run it."""
