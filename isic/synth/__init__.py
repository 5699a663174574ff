"""A synthetic dataset, to run, test and measure the pipeline without the real data."""
