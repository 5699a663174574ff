"""The domain of the ISIC 2024 challenge: tables, images, folds, metrics and the files between steps."""
