"""`python -m benchmarks <command>`: what each step costs and gives on this machine."""

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from benchmarks.process import terminable
from isic.runtime import cli
from isic.runtime.config import Settings, build
from train.config import TrainSettings, load_settings

COMMANDS = (
    *(
        "throughput",
        "export",
        "peers",
        "ingest",
        "train",
        "embed",
        "tabular",
        "accuracy",
        "ablation",
        "hospitals",
        "few",
        "configs",
    ),
    *("report", "check", "pack", "gpu"),
)
"""Each is a function of a module of the same name. Only the one that is asked for is imported: what another needs may
be missing here."""


def load(model: type[Settings], flags: Mapping[str, Any]) -> Settings:
    """Builds a command's settings; those of training come from a config as well."""
    return load_settings(model, flags) if issubclass(model, TrainSettings) else build(model, flags)


if __name__ == "__main__":
    asked = [name for name in sys.argv[1:2] if name in COMMANDS]
    with terminable():
        cli.run(
            {
                name: getattr(import_module(f"benchmarks.{name}"), name)
                for name in asked or COMMANDS
            },
            load,
        )
