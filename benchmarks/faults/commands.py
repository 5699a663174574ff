"""Every command of the toolkit on tiny data, in a folder of its own, with relative paths only.

The inputs are in `inputs/`, the output goes to `out/`. So equal commands write equal bytes, wherever
their folder is.
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

INPUTS = "inputs"
OUT = "out"
TRAIN = (
    f"train --config demo --data {INPUTS}/data --num_folds 2 --image_size 32 --batch_size 16 "
    "--num_workers 0 --num_threads 1"
)
EMBED = (
    f"infer embed --config demo --model_dir {INPUTS}/demo --data {INPUTS}/data --num_threads 1 "
    "--quiet true"
)
FIT = (
    f"infer fit --data {INPUTS}/data --num_folds 2 --seeds 1 --num_rounds 5 --few_table false "
    "--num_threads 1"
)
EMBEDDED = f"--embeddings {INPUTS}/embeddings/demo"
BLEND = f"infer blend {INPUTS}/raw {INPUTS}/multimodal --data {INPUTS}/data"
BUNDLE = f"infer bundle --runs {INPUTS} --packages false --test false"

SMALL_SHARDS = {"infer.embedding.shards:SHARD_ROWS": 20}


@dataclass(frozen=True)
class TinyCommand:
    """A command on the inputs."""

    words: str
    reader: str = ""
    """A command that reads the output."""
    copied: Mapping[str, str] = field(default_factory=dict)
    """Inputs by the place in the output that they are copied to, since the command adds to them."""
    constants: Mapping[str, object] = field(default_factory=dict)
    """Changed values by `module:NAME`, so that tiny data have several parts."""
    launcher: str = ""
    """Module that starts it in a new interpreter, `-` for itself; else a warm process is forked."""

    @property
    def inputs(self) -> set[str]:
        """The names of the inputs that it, or its reader, takes."""
        named = re.findall(rf"{INPUTS}/(\w+)", f"{self.words} {self.reader}")
        return {*named, *(source.partition("/")[0] for source in self.copied.values())}

    def copy_inputs(self, folder: Path) -> None:
        for target, source in self.copied.items():
            shutil.copytree(folder / INPUTS / source, folder / OUT / target)


PREPARED = {
    "data": TinyCommand(
        f"isic synth --output_dir {OUT}/data --images 150 --positives 24 --test_images 30"
    ),
    "trained": TinyCommand(f"{TRAIN} --output_dir {OUT}/trained --epochs 1"),
    "demo": TinyCommand(
        f"export --config demo --model_dir {OUT}/demo --data {INPUTS}/data",
        copied={"demo": "trained/demo"},
    ),
    "embeddings": TinyCommand(f"{EMBED} --output_dir {OUT}/embeddings"),
    "raw": TinyCommand(f"{FIT} --features raw {EMBEDDED} --output_dir {OUT} --name raw"),
    "multimodal": TinyCommand(
        f"{FIT} --features multimodal {EMBEDDED} --output_dir {OUT} --name multimodal"
    ),
    "blend": TinyCommand(f"{BLEND} --output_dir {OUT}"),
    "bundle": TinyCommand(f"{BUNDLE} --ensemble {INPUTS}/blend --output_dir {OUT}/bundle"),
}
"""The commands that make the inputs of others, in order."""


def _train(flags: str, launcher: str = "") -> TinyCommand:
    return TinyCommand(
        # From the beginning with --resume, because a checkpoint holds all settings.
        f"{TRAIN} --output_dir {OUT} --epochs 3 --fold 0 --resume {flags}",
        # Cheaper than an export, which reads the checkpoint.
        reader=f"{TRAIN} --output_dir {OUT} --name read --epochs 1 --fold 0 "
        f"--pretrained {OUT}/demo",
        launcher=launcher,
    )


def _embed(flags: str, launcher: str = "") -> TinyCommand:
    return TinyCommand(
        f"{EMBED} --output_dir {OUT} --batch_size 8 {flags}",
        reader=f"{FIT} --features image --embeddings {OUT}/demo --output_dir {OUT}/ensembles",
        constants={} if launcher else SMALL_SHARDS,
        launcher=launcher,
    )


READ_ENSEMBLE = (
    f"infer predict --data {INPUTS}/data --num_threads 1 {EMBEDDED} "
    f"--output {OUT}/read.csv --ensemble {OUT}"
)

COMMANDS: dict[str, TinyCommand] = {
    "train": _train("--augment_on workers --cache none"),
    "train_cached": _train("--augment_on workers --cache disk --positive_repeats 3"),
    "train_device": _train("--augment_on device --positive_repeats 3 --select_epoch best"),
    "export": TinyCommand(
        f"export --config demo --model_dir {OUT}/demo --data {INPUTS}/data --fold 0",
        reader=f"infer embed --config demo --model_dir {OUT}/demo --data {INPUTS}/data "
        f"--output_dir {OUT}/embeddings --num_threads 1 --quiet true",
        copied={"demo": "trained/demo"},
    ),
    "embed": _embed(""),
    "fit": TinyCommand(
        f"{FIT} --features multimodal {EMBEDDED} --output_dir {OUT} --name fitted "
        " --calibrate platt --refit true",
        reader=READ_ENSEMBLE,
    ),
    "blend": TinyCommand(
        f"{BLEND} --output_dir {OUT} --calibrate platt",
        reader=READ_ENSEMBLE,
    ),
    "predict": TinyCommand(
        f"infer predict --ensemble {INPUTS}/blend --data {INPUTS}/data --num_threads 1 "
        f"{EMBEDDED} --output {OUT}/submission.csv",
    ),
    "bundle": TinyCommand(
        f"{BUNDLE} --ensemble {INPUTS}/blend --output_dir {OUT}/bundle",
        reader=f"infer submit --bundle {OUT}/bundle --data {INPUTS}/data --num_threads 1 "
        f"--output {OUT}/read.csv --quiet true",
    ),
    "submit": TinyCommand(
        f"infer submit --bundle {INPUTS}/bundle --data {INPUTS}/data --num_threads 1 "
        f"--output {OUT}/submission.csv --quiet true --strict true",
        constants=SMALL_SHARDS,
    ),
    "synth": TinyCommand(
        f"isic synth --output_dir {OUT}/data --images 50 --positives 6",
        reader=f"isic check --data {OUT}/data --num_folds 2 --num_threads 1",
    ),
    "import": TinyCommand(
        f"isic import ham10000 --source {INPUTS}/collection --output_dir {OUT}/imported",
        reader=f"isic check --data {OUT}/imported --num_folds 2 --num_threads 1",
    ),
    "folds": TinyCommand(
        f"isic folds --data {INPUTS}/data --group patient_id --num_folds 2 "
        f"--output {OUT}/folds.parquet",
    ),
    "check": TinyCommand(
        f"isic check --data {INPUTS}/data --num_folds 2 --num_threads 1 "
        f"--against {INPUTS}/data --output {OUT}/alike.csv",
    ),
    "report": TinyCommand(
        f"infer report --ensemble {OUT}/blend --data {INPUTS}/data --by sex",
        copied={"blend": "blend"},
    ),
    "explain": TinyCommand(
        f"infer explain --config demo --model_dir {INPUTS}/demo --data {INPUTS}/data --split test "
        f"--ids @{INPUTS}/ids --output_dir {OUT}",
    ),
    "triage": TinyCommand(
        f"infer triage --ensemble {INPUTS}/blend --data {INPUTS}/data --split train "
        f"--max_patients 4 --embeddings {INPUTS}/embeddings/demo --output {OUT}/triage.html",
    ),
    "train_in_two_processes": _train("", "torch.distributed.run --standalone --nproc-per-node 2"),
    "embed_with_decoder_processes": _embed("--decode_in processes --num_threads 2", "-"),
    "embed_in_two_processes": _embed("--num_processes 2", "-"),
    "embed_on_ray": _embed("--ray local", "-"),
    "export_aoti": TinyCommand(
        f"export --config demo --model_dir {OUT}/demo --data {INPUTS}/data --formats aoti "
        "--max_batch 16 --fold 0",
        copied={"demo": "trained/demo"},
        launcher="-",
    ),
}
