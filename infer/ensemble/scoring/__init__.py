"""Scores of ensembles, and comparisons of them."""
