"""The ensemble of gradient-boosted trees: fit, compare and predict."""
