"""`python -m train --config vit_tiny`: trains the folds of a config."""

from isic.runtime.cli import Command, run
from isic.runtime.interrupt import end_with_torchrun
from train.config import load_settings

COMMANDS = Command("train.config:TrainSettings", "train.run:train", load_settings, "train")

if __name__ == "__main__":
    end_with_torchrun()  # first of all: the imports of a command take seconds
    run(COMMANDS)
