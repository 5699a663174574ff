"""`python -m benchmarks <command>`: speed and scores of each step on this machine."""

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from benchmarks.process import terminable
from isic.runtime import cli
from isic.runtime.config import Settings, build
from train.config import TrainSettings, load_settings

# fmt: off
COMMANDS = (
    "throughput", "export", "peers", "ingest", "train", "embed", "tabular",
    "accuracy", "ablation", "hospitals", "few", "configs",
    "report", "check", "pack", "gpu",
)
# fmt: on
"""Each is a function of the module of the same name."""


def load(model: type[Settings], flags: Mapping[str, Any]) -> Settings:
    """Builds a command's settings; those of training also read a config."""
    return load_settings(model, flags) if issubclass(model, TrainSettings) else build(model, flags)


if __name__ == "__main__":
    # Import only the command that is asked for: others may need packages that are missing here.
    asked = [name for name in sys.argv[1:2] if name in COMMANDS]
    commands = {
        name: getattr(import_module(f"benchmarks.{name}"), name) for name in asked or COMMANDS
    }
    with terminable():
        cli.run(commands, load)
