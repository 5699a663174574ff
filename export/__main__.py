"""`python -m export --config eva02_base`: exports trained folds; with `--model` a backbone."""

from isic.runtime.cli import Command, run

COMMANDS = Command("export.options:ExportSettings", "export.run:export", extra="export")

if __name__ == "__main__":
    run(COMMANDS)
