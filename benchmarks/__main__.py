"""`python -m benchmarks <command>`: speed and scores of each step on this machine."""

from benchmarks.process import terminable
from isic.runtime.cli import Command, run
from train.config import load_settings

SETTINGS = {
    "throughput": "ThroughputSettings",
    "export": "ExportCostSettings",
    "peers": "PeersSettings",
    "ingest": "IngestSettings",
    "train": "TrainRateSettings",
    "embed": "EmbedRateSettings",
    "tabular": "TabularSettings",
    "accuracy": "AccuracySettings",
    "ablation": "AblationSettings",
    "hospitals": "HospitalSettings",
    "few": "FewSettings",
    "configs": "ConfigsSettings",
    "report": "TablesSettings",
    "check": "SlowdownSettings",
    "pack": "PackSettings",
    "gpu": "GpuSettings",
}
"""Class in `benchmarks.settings` by command; a command is a function of the module of its name."""

COMMANDS = {
    name: Command(f"benchmarks.settings:{settings}", f"benchmarks.{name}:{name}")
    for name, settings in SETTINGS.items()
}
COMMANDS["train"] = Command(
    "benchmarks.settings:TrainRateSettings", "benchmarks.train:train", load_settings
)

if __name__ == "__main__":
    with terminable():
        run(COMMANDS)
