"""The words of `--features`: built-in, own and selected features."""
