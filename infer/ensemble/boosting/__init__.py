"""Fit boosters, on folds and on every row."""
