"""Embed images: decode them, run the engines of all folds, write features and logits."""
