"""`python -m isic synth | check | import`."""

from isic.runtime.cli import Command, run

COMMANDS = {
    "synth": Command("isic.settings:SynthSettings", "isic.synth.dataset:synth"),
    "check": Command("isic.settings:CheckSettings", "isic.check:check"),
    "import": Command("isic.settings:ImportSettings", "isic.importers.run:import_collection"),
}

if __name__ == "__main__":
    run(COMMANDS)
