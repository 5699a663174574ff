"""A dataset and a run of stand-in engines that embed in moments, for tests of all that is around an engine."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from infer.embedding import plan
from infer.embedding.embed import EmbedSettings, embed
from infer.engines.null import NULL_FILE, write_run
from isic.preprocess import PreprocessSpec
from tests.support.commands import ROOT
from tests.support.datasets import jpeg, write_hdf5

SIZE = 16
PART_ROWS = 20


@dataclass(frozen=True)
class StandIn:
    """Where a small dataset and its engines are."""

    data: Path
    model_dir: Path

    def flags(self, output: Path, *more: object) -> list[str]:
        where = (
            "--data",
            self.data,
            "--model_dir",
            self.model_dir,
            "--output_dir",
            output,
            "--engine",
            NULL_FILE,
        )
        return [*map(str, ("embed", "--config", "null", *where, *more))]

    def command(self, output: Path, *more: object, part_rows: int = PART_ROWS) -> list[str]:
        """A process of its own, with parts so small that there are many."""
        code = (
            f"import sys, infer.embedding.plan; infer.embedding.plan.PART_ROWS = {part_rows}\n"
            "from infer.embedding.embed import embed; from isic.runtime import cli; cli.run({'embed': embed})"
        )
        return [sys.executable, "-c", code, *self.flags(output, "--batch_size", 8, *more)]

    def run(
        self, output: Path, *more: object, part_rows: int = PART_ROWS
    ) -> "subprocess.CompletedProcess[str]":
        command = self.command(output, *more, part_rows=part_rows)
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )


def embed_small_parts(stand_in: StandIn, output: Path) -> None:
    """What a process forked from one that has imported everything runs: it is at work within milliseconds."""
    plan.PART_ROWS = PART_ROWS
    where = {"data": stand_in.data, "model_dir": stand_in.model_dir, "output_dir": output}
    sys.exit(embed(EmbedSettings(config="null", engine=NULL_FILE, batch_size=8, **where)))


def make_stand_in(
    folder: Path,
    num_images: int = 300,
    num_folds: int = 3,
    num_features: int = 8,
    images_per_second: float | None = None,
) -> StandIn:
    """Writes both: every image has a grey of its own at 16 x 16 pixels."""
    data, model_dir = folder / "data", folder / "null"
    data.mkdir(parents=True)
    ids = [f"ISIC_{row:07d}" for row in range(num_images)]
    table = {"isic_id": ids, "target": [row % 3 == 0 for row in range(num_images)]}
    pl.DataFrame(table).with_columns(pl.col("target").cast(pl.Int8)).write_csv(
        data / "train-metadata.csv"
    )
    write_hdf5(
        data / "train-image.hdf5", {name: jpeg(SIZE, row % 256) for row, name in enumerate(ids)}
    )
    spec = PreprocessSpec(size=SIZE)
    write_run(
        model_dir, data / "train-metadata.csv", spec, num_folds, num_features, images_per_second
    )
    return StandIn(data, model_dir)


def parts(root: Path) -> dict[str, bytes]:
    """Returns the bytes of every part, and of the lists of bad images, by its path."""
    patterns = ("part-*.parquet", "errors*.parquet")
    return {
        str(path.relative_to(root)): path.read_bytes()
        for pattern in patterns
        for path in root.rglob(pattern)
    }


def grey(row: int) -> np.float16:
    """What an engine says of the image in a row."""
    return np.float16(row % 256 / 255)
