"""From features to a score: the gradient-boosted ensemble, fitted, judged and applied."""
