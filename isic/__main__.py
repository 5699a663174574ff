"""`python -m isic synth | check | folds`."""

from isic.runtime.cli import Command, run

COMMANDS = {
    "synth": Command("isic.settings:SynthSettings", "isic.synth.dataset:synth"),
    "check": Command("isic.settings:CheckSettings", "isic.check:check"),
    "folds": Command("isic.settings:FoldsSettings", "isic.group_folds:write_group_folds"),
}

if __name__ == "__main__":
    run(COMMANDS)
