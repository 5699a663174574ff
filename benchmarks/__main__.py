"""`python -m benchmarks <command>`: speed and scores of each step on this machine."""

from collections.abc import Mapping
from typing import Any

from benchmarks.process import terminable
from benchmarks.settings import IS_CHECKOUT, RESULTS, PackSettings, TablesSettings
from isic.runtime.cli import Command, run
from isic.runtime.config import Settings, build
from isic.runtime.errors import UserError
from train.config import TrainSettings, load_settings

SETTINGS = {
    "correctness": "CorrectnessSettings",
    "throughput": "ThroughputSettings",
    "export": "ExportCostSettings",
    "peers": "PeersSettings",
    "ingest": "IngestSettings",
    "train": "TrainRateSettings",
    "augment": "AugmentSettings",
    "embed": "EmbedRateSettings",
    "pipeline": "PipelineSettings",
    "tabular": "TabularSettings",
    "networks": "NetworksSettings",
    "accuracy": "AccuracySettings",
    "comparisons": "ComparisonsSettings",
    "submissions": "SubmissionsSettings",
    "ablation": "AblationSettings",
    "hospitals": "HospitalSettings",
    "few": "FewSettings",
    "configs": "ConfigsSettings",
    "start": "StartSettings",
    "faults": "FaultsSettings",
    "report": "TablesSettings",
    "check": "SlowdownSettings",
    "pack": "PackSettings",
    "gpu": "GpuSettings",
}
"""Class in `benchmarks.settings` by command; a command is a function of the module of its name."""


def load_benchmark(model: type[Settings], flags: Mapping[str, Any]) -> Settings:
    """Build a benchmark's settings; those of training also read a config.

    Raises:
        UserError: also if an installed package has no place for the results, or not the sources.
    """
    settings: Settings = (
        load_settings(model, flags) if issubclass(model, TrainSettings) else build(model, flags)
    )
    if not IS_CHECKOUT:
        if isinstance(settings, TablesSettings | PackSettings):
            raise UserError("this command reads the sources; run it in a checkout of the project")
        if getattr(settings, "results", RESULTS) in (None, RESULTS):
            raise UserError("give --results: an installed package has no folder for results")
    return settings


COMMANDS = {
    name: Command(
        f"benchmarks.settings:{settings}",
        f"benchmarks.{name}:{name}",
        load_benchmark,
        extra="benchmarks",
    )
    for name, settings in SETTINGS.items()
}

if __name__ == "__main__":
    with terminable():
        run(COMMANDS)
