"""`python -m isic synth | check`."""

from isic.runtime.cli import Command, run

COMMANDS = {
    "synth": Command("isic.settings:SynthSettings", "isic.synth.dataset:synth"),
    "check": Command("isic.settings:CheckSettings", "isic.check:check"),
}

if __name__ == "__main__":
    run(COMMANDS)
