"""The inputs of the tiny commands, and their undisturbed results."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import h5py

from benchmarks.faults.commands import COMMANDS, INPUTS, OUT, PREPARED, TinyCommand
from benchmarks.faults.operations import note_operations, read_operations
from benchmarks.faults.processes import run
from isic.metadata import read_ids
from isic.runtime.errors import UserError
from isic.runtime.files import read_json, write_json

SECONDS = 600.0
"""Time limit of a command without a fault."""
UNDISTURBED = "undisturbed"
MAKING = "making"
FACTS = "facts.json"
OPERATIONS = "operations"
NUM_IMAGES = 12
"""Images of the collection to import."""
NUM_IDS = 3


class Tiny:
    """The folder of a campaign, with all that is made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.inputs = self.folder / INPUTS

    def prepare(self, names: Iterable[str]) -> None:
        """Make the inputs and the undisturbed results of commands, unless they are there."""
        self.inputs.mkdir(exist_ok=True)
        for name in names:
            for wanted in sorted(COMMANDS[name].inputs):
                self._make_input(wanted)
            if not self.undisturbed(name).exists():
                making = self._run(name, COMMANDS[name])
                self.undisturbed(name).parent.mkdir(exist_ok=True)
                _move(making, self.undisturbed(name))

    def undisturbed(self, name: str) -> Path:
        """Return the folder in which a command has run without a fault."""
        return self.folder / UNDISTURBED / name

    def facts(self, name: str) -> dict[str, Any]:
        """Return the `seconds` and the number of file `operations` of that run."""
        return read_json(self.undisturbed(name) / FACTS)

    def _make_input(self, name: str) -> None:
        """Make an input and those that it is made from, unless they are there."""
        path = self.inputs / name
        if path.exists():
            return
        if name in WRITERS:
            self._make_input("data")
            WRITERS[name](self.inputs / "data", path)
            return
        for wanted in sorted(PREPARED[name].inputs):
            self._make_input(wanted)
        making = self._run(name, PREPARED[name])
        _move(making / OUT / name, path)
        shutil.rmtree(making)

    def _run(self, name: str, command: TinyCommand) -> Path:
        """Run a command without a fault. Return its folder."""
        making = self.folder / MAKING / f"{name}-{os.getpid()}"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        fresh_folder(making, self.inputs, command)
        note = partial(note_operations, making / OUT, making / OPERATIONS)
        ended = run(command, making, SECONDS, [] if command.launcher else [note])
        if ended.code != 0:
            raise UserError(f"{name} failed without a fault: {ended}")
        operations = len(read_operations(making / OPERATIONS))
        write_json(making / FACTS, {"seconds": ended.seconds, "operations": operations})
        return making


def _move(source: Path, target: Path) -> None:
    """Give a folder its name, unless another worker has made an equal one meanwhile."""
    with contextlib.suppress(OSError):
        source.rename(target)
    if not target.exists():
        raise UserError(f"{target} cannot be written; choose another --work_dir")


def write_collection(data: Path, path: Path) -> None:
    """Write a few images of a dataset as HAM10000 is published."""
    (path / "images").mkdir(parents=True)
    lines = ["lesion_id,image_id,dx,dx_type,age,sex,localization,dataset"]
    with h5py.File(data / "train-image.hdf5", "r") as file:
        for number, name in enumerate(list(file)[:NUM_IMAGES]):
            (path / "images" / f"{name}.jpg").write_bytes(bytes(file[name][()]))
            kind = "nv" if number % 3 else "mel"
            lines.append(f"HAM_{number},{name},{kind},histo,50.0,male,back,vidir_modern")
    (path / "HAM10000_metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_ids(data: Path, path: Path) -> None:
    """Write the first ids of the test table, one per line."""
    ids = read_ids(data / "test-metadata.csv")[:NUM_IDS]
    path.write_text("\n".join(ids) + "\n", encoding="utf-8")


WRITERS: Mapping[str, Callable[[Path, Path], None]] = {
    "collection": write_collection,
    "ids": write_ids,
}
"""Inputs that no command makes, each from a dataset."""


def fresh_folder(folder: Path, inputs: Path, command: TinyCommand) -> None:
    """Fill an empty folder with the inputs, by a link, and an output to begin with."""
    (folder / INPUTS).symlink_to(inputs.resolve(), target_is_directory=True)
    (folder / OUT).mkdir()
    command.copy_inputs(folder)
