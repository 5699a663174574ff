"""The inputs of the tiny commands, and their undisturbed results."""

import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import polars as pl

from benchmarks.faults.commands import COMMANDS, INPUTS, OUT, PREPARATION, TinyCommand
from benchmarks.faults.operations import note_operations, read_operations
from benchmarks.faults.processes import run
from isic.runtime.errors import UserError
from isic.runtime.files import read_json, write_json

SECONDS = 600.0
"""Time limit of a command without a fault."""
IDS_FILE = "ids.txt"
COLLECTION = "collection"
UNDISTURBED = "undisturbed"
FACTS = "facts.json"
OPERATIONS = "operations"


class Tiny:
    """The folder of a campaign, with all that is made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.inputs = self.folder / INPUTS

    def prepare(self, names: Iterable[str]) -> None:
        """Make the inputs, and the undisturbed results of commands, unless they are there."""
        prepare_inputs(self.folder)
        for name in names:
            if not self.undisturbed(name).exists():
                self._run(name)

    def undisturbed(self, name: str) -> Path:
        """Return the folder in which a command has run without a fault."""
        return self.folder / UNDISTURBED / name

    def facts(self, name: str) -> dict[str, Any]:
        """Return the `seconds` and the number of file `operations` of that run."""
        return read_json(self.undisturbed(name) / FACTS)

    def _run(self, name: str) -> None:
        making = self.folder / "making" / name
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        command = COMMANDS[name]
        fresh_folder(making, self.inputs, command)
        before = (
            []
            if command.launcher
            else [partial(note_operations, making / OUT, making / OPERATIONS)]
        )
        ended = run(command, making, SECONDS, before)
        if ended.code != 0:
            raise UserError(f"{name} failed without a fault: {ended}")
        operations = len(read_operations(making / OPERATIONS))
        write_json(making / FACTS, {"seconds": ended.seconds, "operations": operations})
        self.undisturbed(name).parent.mkdir(exist_ok=True)
        making.rename(self.undisturbed(name))


def prepare_inputs(folder: Path) -> None:
    """Make all inputs in `<folder>/inputs`, unless they are there."""
    if (folder / INPUTS).exists():
        return
    making = folder / "making"
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    for words in PREPARATION:
        ended = run(TinyCommand(words), making, SECONDS)
        if ended.code:
            raise UserError(f"`python -m {words}` failed without a fault: {ended}")
        if words.startswith("train "):
            shutil.copytree(making / INPUTS / "demo", making / INPUTS / "trained")
    ids = pl.read_csv(making / INPUTS / "data" / "test-metadata.csv")["isic_id"]
    (making / INPUTS / IDS_FILE).write_text("\n".join(ids[:3]) + "\n")
    write_collection(making / INPUTS / "data", making / INPUTS / COLLECTION)
    (making / INPUTS).rename(folder / INPUTS)
    shutil.rmtree(making)


def write_collection(data: Path, folder: Path) -> None:
    """Write a few images of a dataset as HAM10000 is published."""
    (folder / "images").mkdir(parents=True)
    lines = ["lesion_id,image_id,dx,dx_type,age,sex,localization,dataset"]
    with h5py.File(data / "train-image.hdf5", "r") as file:
        for number, name in enumerate(list(file)[:12]):
            (folder / "images" / f"{name}.jpg").write_bytes(bytes(file[name][()]))
            kind = "mel" if number % 3 == 0 else "nv"
            lines.append(f"HAM_{number},{name},{kind},histo,50.0,male,back,vidir_modern")
    (folder / "HAM10000_metadata.csv").write_text("\n".join(lines) + "\n")


def fresh_folder(folder: Path, inputs: Path, command: TinyCommand) -> None:
    """Fill an empty folder with the inputs, by a link, and an output to begin with."""
    (folder / INPUTS).symlink_to(inputs.resolve(), target_is_directory=True)
    (folder / OUT).mkdir()
    command.copy_inputs(folder)
