"""The valid files of the campaign of broken inputs: a small project, made by the commands."""

import os
import runpy
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

import albumentations as A
import cv2
import polars as pl

from isic.dataset import Dataset
from isic.preprocess import decode
from isic.tables import write_parquet

NETWORK = "tiny"
PICTURES = ("a.jpg", "b.png", "c.webp")
CONFIG = """# A config of a small network
model: test_vit
pretrained: false
image_size: 32
epochs: 2
lr: 1e-3
mixup: 0.2
fold: 0
aux: "mel: iddx_full ~ Melanoma"
"""
DEFINITIONS = """
norm_L: {expr: (tbp_lv_stdL + tbp_lv_color_std_mean) / tbp_lv_L, relative: [patient_z]}
place: CONCAT(sex, '_', anatom_site_general)
"""
# fmt: off
TRAIN = (
    "--model", "test_vit", "--pretrained", "false", "--image_size", 32, "--num_workers", 0,
    "--name", NETWORK, "--data", "data", "--output_dir", "runs", "--num_folds", 3, "--epochs", 1,
    "--device", "cpu", "--precision", "fp32", "--num_threads", 1,
)
FIT = (
    "--data", "data", "--out", "ensembles", "--embeddings", f"embeddings/{NETWORK}", "--seeds", 1,
    "--num_rounds", 5, "--num_threads", 1,
)
# fmt: on


def run(module: str, *arguments: object) -> None:
    """Run `python -m <module> <arguments>` in this process. Raise RuntimeError if it fails."""
    before, sys.argv = sys.argv, [module, *map(str, arguments)]
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"{module} {arguments} exited with {ended.code}") from None
    finally:
        sys.argv = before


def make_data() -> None:
    run("isic", "synth", "--out", "data", "--images", 240, "--positives", 60, "--test_images", 12)


def make_pictures() -> None:
    """Write three images in three formats."""
    dataset = Dataset(Path("data"))
    ids = dataset.images("train").ids[: len(PICTURES)].tolist()
    Path("pictures").mkdir()
    for name, data in zip(PICTURES, dataset.images("train").read(ids), strict=True):
        pixels = cv2.cvtColor(decode(data), cv2.COLOR_RGB2BGR)
        Path("pictures", name).write_bytes(cv2.imencode(Path(name).suffix, pixels)[1].tobytes())


def make_tables() -> None:
    """Write the training table as Parquet, own columns, and a config of each kind."""
    rows = Dataset(Path("data")).metadata("train")
    write_parquet(Path("tables/train-metadata.parquet"), rows)
    own = rows.select("isic_id", distance=pl.col("tbp_lv_L") / 10, group=pl.col("sex"))
    own.write_csv("tables/own.csv")
    write_parquet(Path("tables/more.parquet"), own.rename({"distance": "d2", "group": "g2"}))
    Path("tables/mine.yaml").write_text(DEFINITIONS, encoding="utf-8")
    Path("tables/my_config.yaml").write_text(CONFIG, encoding="utf-8")
    A.save(A.Compose([A.HorizontalFlip(p=0.5), A.Affine(rotate=(-9, 9))]), "tables/augment.json")


def make_run() -> None:
    run("train", *TRAIN)


def make_artifacts() -> None:
    run("export", "--config", NETWORK, "--model_dir", f"runs/{NETWORK}")


def make_package() -> None:
    _export("aoti", "fp32")


def make_plan() -> None:
    _export("tensorrt_rtx", "fp16", "--max_batch", 4)


def _export(format_name: str, precision: str, *flags: object) -> None:
    """Export fold 0 to another folder, so that the format is not chosen elsewhere."""
    shutil.copytree("runs", f"runs_{format_name}")
    folder = f"runs_{format_name}/{NETWORK}"
    chosen = ("--formats", format_name, "--precision", precision, "--fold", 0)
    run("export", "--config", NETWORK, "--model_dir", folder, *chosen, *flags)


def make_embeddings() -> None:
    folders = ("--model_dir", f"runs/{NETWORK}", "--data", "data", "--output_dir", "embeddings")
    run("infer", "embed", "--config", NETWORK, *folders, "--format", "onnx", "--folds", "all")


def make_ensembles() -> None:
    """Fit boosters of all libraries, one with image features, and their blend."""
    three = ("--libraries", "lightgbm,xgboost,catboost", "--catboost", "{depth: 3}")
    run("infer", "fit", *FIT, "--name", "three", "--features", "raw", *three)
    more = ("--features", "multimodal,aligned", "--calibrate", "platt")
    run("infer", "fit", *FIT, "--name", "images", *more)
    run("infer", "fit", *FIT, "--name", "tables", "--features", "raw")
    run("infer", "fit", *FIT, "--name", "multimodal", "--features", "multimodal")
    members = ("ensembles/tables", "ensembles/multimodal")
    run("infer", "blend", *members, "--data", "data", "--out", "ensembles", "--name", "final")


def make_submission() -> None:
    folders = ("--ensemble", "ensembles/tables", "--data", "data")
    run("infer", "predict", *folders, "--output", "submissions/submission.csv")


def make_bundle() -> None:
    flags = ("--runs", "runs", "--packages", "false", "--test", "false")
    run("infer", "bundle", "--ensemble", "ensembles/final", "--output_dir", "bundle", *flags)


@dataclass(frozen=True)
class Part:
    """A folder of the project, or files that are added to one."""

    make: Callable[[], None]
    """Makes it, in the project's folder."""
    needs: tuple[str, ...] = ()
    """The parts that it is made from."""


PARTS: Mapping[str, Part] = {
    "data": Part(make_data),
    "pictures": Part(make_pictures, ("data",)),
    "tables": Part(make_tables, ("data",)),
    "runs": Part(make_run, ("data",)),
    "artifacts": Part(make_artifacts, ("runs",)),
    "runs_aoti": Part(make_package, ("runs",)),
    "runs_tensorrt_rtx": Part(make_plan, ("runs",)),
    "embeddings": Part(make_embeddings, ("artifacts",)),
    "ensembles": Part(make_ensembles, ("embeddings",)),
    "submissions": Part(make_submission, ("ensembles",)),
    "bundle": Part(make_bundle, ("ensembles",)),
}
"""The parts of the project in the order in which they are made."""


def make_parts(folder: Path, names: Iterable[str]) -> None:
    """Make parts of the project, and those they need, that are not there yet.

    It runs in a process of its own.
    """
    wanted = _with_needs(names)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["XDG_STATE_HOME"] = str(folder / ".state")  # not the user's list of trusted exports
    with chdir(folder):
        for name, part in PARTS.items():
            done = Path(f".{name}.done")
            if name in wanted and not done.exists():
                shutil.rmtree(name, ignore_errors=True)
                part.make()
                done.touch()


def _with_needs(names: Iterable[str]) -> set[str]:
    return {each for name in names for each in (name, *_with_needs(PARTS[name].needs))}
