"""`python -m export --config eva02_base`: exports the trained folds of a config."""

from export.run import export
from isic.runtime import cli

if __name__ == "__main__":
    cli.run(export)
