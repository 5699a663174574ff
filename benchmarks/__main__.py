"""`python -m benchmarks ingest | train | embed | tabular | accuracy | ablation | report`: what each step costs and gives."""

from collections.abc import Mapping
from typing import Any

from benchmarks.ablation import ablation
from benchmarks.accuracy import accuracy
from benchmarks.embed import embed
from benchmarks.ingest import ingest
from benchmarks.report import report
from benchmarks.tabular import tabular
from benchmarks.train import train
from isic import cli
from isic.config import Settings, build
from train.config import TrainSettings, load_settings


def load(model: type[Settings], flags: Mapping[str, Any]) -> Settings:
    """Builds a command's settings; those of training come from a config as well."""
    return load_settings(model, flags) if issubclass(model, TrainSettings) else build(model, flags)


if __name__ == "__main__":
    commands: dict[str, cli.Command] = {
        "ingest": ingest,
        "train": train,
        "embed": embed,
        "tabular": tabular,
        "accuracy": accuracy,
        "ablation": ablation,
        "report": report,
    }
    cli.run(commands, load)
