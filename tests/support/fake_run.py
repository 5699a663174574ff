"""A dataset and a run of null engines, to test embedding without the time of a real engine."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from infer.embedding import shards
from infer.embedding.embed import embed_dataset
from infer.embedding.embedder import EmbedJob
from infer.embedding.models import find_models
from infer.embedding.settings import EmbedSettings
from infer.embedding.shards import Shard
from infer.engines.null import NULL_FILE, write_run
from isic.preprocess import PreprocessSpec
from tests.support.commands import ROOT
from tests.support.datasets import jpeg, write_hdf5

SIZE = 16
SHARD_ROWS = 20
"""So few that a small run has many shards."""

COMMAND = """
import infer.embedding.shards
infer.embedding.shards.SHARD_ROWS = {shard_rows}
from infer.__main__ import COMMANDS
from isic.runtime.cli import run
run(COMMANDS)
"""


@dataclass(frozen=True)
class FakeRun:
    """The folders of a small dataset and of a run with null engines."""

    data: Path
    model_dir: Path

    def flags(self, output: Path, *more: object) -> list[str]:
        # fmt: off
        flags = (
            "embed", "--config", "null", "--format", NULL_FILE,
            "--data", self.data, "--model_dir", self.model_dir, "--output_dir", output,
        )
        # fmt: on
        return [str(flag) for flag in (*flags, *more)]

    def command(self, output: Path, *more: object, shard_rows: int = SHARD_ROWS) -> list[str]:
        """Return the command that embeds in a process of its own, in small shards."""
        code = COMMAND.format(shard_rows=shard_rows)
        return [sys.executable, "-c", code, *self.flags(output, "--batch_size", 8, *more)]

    def run(
        self, output: Path, *more: object, shard_rows: int = SHARD_ROWS
    ) -> "subprocess.CompletedProcess[str]":
        command = self.command(output, *more, shard_rows=shard_rows)
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )


def embed_small_shards(fake_run: FakeRun, output: Path) -> None:
    """Embed in this process; forked from one that has imported everything, it starts at once."""
    shards.SHARD_ROWS = SHARD_ROWS
    folders = {"data": fake_run.data, "model_dir": fake_run.model_dir, "output_dir": output}
    sys.exit(embed_dataset(EmbedSettings(config="null", format=NULL_FILE, batch_size=8, **folders)))


def make_fake_run(
    folder: Path,
    num_images: int = 300,
    num_folds: int = 3,
    num_features: int = 8,
    images_per_second: float | None = None,
) -> FakeRun:
    """Write the dataset and the run. Image i is 16 x 16 pixels of grey i modulo 256."""
    data = folder / "data"
    model_dir = folder / "null"
    data.mkdir(parents=True)
    ids = [f"ISIC_{row:07d}" for row in range(num_images)]
    target = pl.Series([row % 3 == 0 for row in range(num_images)]).cast(pl.Int8)
    metadata = data / "train-metadata.csv"
    pl.DataFrame({"isic_id": ids, "target": target}).write_csv(metadata)
    images = {name: jpeg(SIZE, row % 256) for row, name in enumerate(ids)}
    write_hdf5(data / "train-image.hdf5", images)
    spec = PreprocessSpec(size=SIZE)
    write_run(model_dir, metadata, spec, num_folds, num_features, images_per_second)
    return FakeRun(data, model_dir)


def shard_bytes(root: Path) -> dict[str, bytes]:
    """Return the bytes of every shard, and of the lists of bad images, by relative path."""
    shard_files = root.rglob("part-*.parquet")
    error_files = root.rglob("errors*.parquet")
    return {str(path.relative_to(root)): path.read_bytes() for path in (*shard_files, *error_files)}


def grey(row: int) -> np.float16:
    """Return the null engine's features of the image in a row."""
    return np.float16(row % 256 / 255)


def null_job(fake_run: FakeRun) -> EmbedJob:
    """Return a job for the train images of a run, in batches of four."""
    models = find_models(fake_run.model_dir, "null", NULL_FILE)
    return EmbedJob(fake_run.data, "train", models, "cpu", "float16", "none", 4, 2, None)


def finished_shard(folder: Path, number: int, num_ids: int = 10, num_bad: int = 0) -> Shard:
    """Write an empty file as a finished shard, the first images of which are bad."""
    ids = pl.Series([f"{number}-{row}" for row in range(num_ids)])
    shard = Shard(ids, {0: folder / f"part-{number:05d}.parquet"})
    shard.paths[0].touch()
    if num_bad:
        bad = {"isic_id": ids[:num_bad], "reason": ["truncated JPEG"] * num_bad}
        pl.DataFrame(bad).write_parquet(shard.errors_path)
    return shard


def embed_flags(exported: Path, data: Path, output: Path, *more: object) -> list[object]:
    """Return the arguments of `infer embed` for the fixture `exported`."""
    folders = ["--model_dir", exported, "--data", data, "--output_dir", output]
    return ["embed", "--model_config", "tiny", *folders, *more]
