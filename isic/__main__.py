"""`python -m isic synth | check | folds | import`."""

from isic.runtime.cli import Command, run

COMMANDS = {
    "synth": Command("isic.settings:SynthSettings", "isic.synth.dataset:synth"),
    "check": Command("isic.settings:CheckSettings", "isic.check:check"),
    "folds": Command("isic.settings:FoldsSettings", "isic.group_folds:write_group_folds"),
    "import": Command("isic.settings:ImportSettings", "isic.importers.run:import_collection"),
}

if __name__ == "__main__":
    run(COMMANDS)
