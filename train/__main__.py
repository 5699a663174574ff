"""`python -m train --config vit_tiny`: trains the folds of a config."""

from isic.runtime.cli import Command, run
from train.config import load_settings

COMMANDS = Command("train.config:TrainSettings", "train.run:train", load_settings, "train")

if __name__ == "__main__":
    run(COMMANDS)
