"""The files of the campaign of broken inputs, and how the commands read each of them."""

import csv
import hashlib
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from benchmarks.faults.valid import NETWORK
from export.options import ExportSettings
from export.parity import run_model
from export.run import load_source
from infer import load_embedder
from infer.embedding.embed import embed_dataset
from infer.embedding.models import open_artifact
from infer.embedding.settings import EmbedSettings
from infer.ensemble.predict import predict_submission
from infer.ensemble.rows import read_rows
from infer.ensemble.scoring.scores import show_scores
from infer.ensemble.settings import FitSettings, PredictSettings, ScoresSettings
from infer.submission.settings import SubmitSettings
from infer.submission.submit import submit
from isic.dataset import Dataset
from isic.folds import read_folds
from isic.runtime.config import build
from isic.runtime.files import sha256
from isic.settings import SynthSettings
from isic.synth.dataset import synth
from isic.tables import read_parquet
from train.augmentation.pipeline import check_augmentation
from train.config import TrainSettings, load_settings
from train.model import create_model
from train.pretrained import find_weights
from train.resume import is_finished
from train.rows import load_data, load_rows
from train.state import create_state, restore

RUN = f"runs/{NETWORK}"
FOLD = f"{RUN}/fold_0"
EMBEDDED = f"embeddings/{NETWORK}"
OUT = Path("out")
"""The folder of all outputs."""
CPU = torch.device("cpu")


class PartialOutput(AssertionError):
    """A file under its final name is not whole, or holds values that are not finite."""


def fingerprint(*arrays: NDArray[Any]) -> str:
    """Return a digest of arrays. Raise AssertionError for a number that is not finite."""
    for array in arrays:
        assert array.dtype.kind not in "fc" or np.isfinite(array).all(), "a value is not finite"
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


def digest_of_table(table: pl.DataFrame) -> str:
    return hashlib.sha256(table.write_csv().encode()).hexdigest()[:16]


def embed_picture(name: str) -> str:
    """Embed an image with the network of a fold, as from Python."""
    with load_embedder(f"{FOLD}/model.onnx", device="cpu", num_threads=1) as embedder:
        return _outputs(embedder, name)


def embed_with(folder: str, **flags: Any) -> str:
    """Embed an image with the networks of a run."""
    with load_embedder(folder, device="cpu", num_threads=1, **flags) as embedder:
        return _outputs(embedder, "a.jpg")


def _outputs(embedder: object, name: str) -> str:
    found = embedder.embed([f"pictures/{name}"])  # type: ignore[attr-defined]
    parts = [array for each in found.by_fold.values() for array in (each.features, each.logits)]
    return fingerprint(*parts)


def embed(output: str = "out", **flags: object) -> str:
    """Embed the training images, as `infer embed` does."""
    folders = {"model_dir": RUN, "data": "data", "output_dir": output}
    others = {"format": "onnx", "split": "train", "num_threads": 1, "quiet": True}
    settings = build(EmbedSettings, {"config": NETWORK, **folders, **others, **flags})
    _exit_on_code(embed_dataset(settings))
    return digest_of_outputs(Path(output))


def predict(ensemble: str, output: Path = OUT / "submission.csv", **flags: object) -> str:
    """Score the test table, as `infer predict` does."""
    folders = {"ensemble": f"ensembles/{ensemble}", "data": "data", "output": output}
    predict_submission(build(PredictSettings, {"num_threads": 1, **folders, **flags}))
    return digest_of_outputs(output.parent)


def predict_with_images(ensemble: str = "images") -> str:
    return predict(ensemble, embeddings=EMBEDDED)


def read_training(data: str = "data", **flags: object) -> str:
    """Read and fit the features of the training rows, as `infer fit` does."""
    rows = read_rows(build(FitSettings, {"data": data, "num_folds": 3, **flags}))
    return digest_of_table(rows.table.features)


def read_training_parquet() -> str:
    Path("data/train-metadata.csv").unlink()
    shutil.copyfile("tables/train-metadata.parquet", "data/train-metadata.parquet")
    return read_training(features="engineered")


def submit_bundle() -> str:
    """Submit with a bundle, as its script does."""
    folders = {"bundle": "bundle", "data": "data", "output": OUT / "submission.csv"}
    flags = {"device": "cpu", "num_threads": 1, "quiet": True}
    _exit_on_code(submit(build(SubmitSettings, {**folders, **flags})))
    return digest_of_outputs(OUT, "submission.csv")


def read_fold_plan() -> str:
    return str(read_folds(Path(RUN, "folds.parquet")).of(Dataset(Path("data")).metadata("train")))


def train_settings(**flags: object) -> TrainSettings:
    given = {"model": "test_vit", "pretrained": False, "image_size": 32, "num_workers": 0}
    folders = {"name": NETWORK, "data": "data", "output_dir": "runs"}
    recipe = {"num_folds": 3, "epochs": 1, "device": "cpu", "precision": "fp32", "num_threads": 1}
    return build(TrainSettings, {**given, **folders, **recipe, **flags})


def read_masks() -> str:
    """Read images and masks, as training does."""
    dataset = Dataset(Path("data"))
    rows = load_rows(dataset, dataset.metadata("train").head(8), train_settings(mask_weight=1))
    assert rows.masks is not None
    masks = b"".join(bytes(rows.masks[row]) for row in range(len(rows.table)))
    return hashlib.sha256(masks).hexdigest()


def read_train_config() -> str:
    return str(load_settings(TrainSettings, {"config": "tables/my_config.yaml"}).model_dump())


def read_augmentation() -> str:
    settings = train_settings(augmentation="tables/augment.json")
    check_augmentation(settings.augmentation, settings.image_size, with_masks=False)
    return "accepted"


def read_finished_fold() -> str:
    settings = train_settings(augment_on="auto")
    return str(is_finished(settings, 0))


def read_best_checkpoint() -> str:
    """Load a checkpoint into its network, as export does, and run it."""
    path = Path(FOLD, "best_model.pth")
    settings = ExportSettings(config=NETWORK, model_dir=Path(RUN))
    source = load_source(path, sha256(path), 0, settings)
    size = source.preprocess.size
    images = np.full((2, size, size, 3), 128, np.uint8)
    outputs = run_model(source.model, images)
    return hashlib.sha256(b"".join(array.tobytes() for array in outputs)).hexdigest()


def read_last_checkpoint() -> str:
    """Restore the state of a fold, as `train --resume` does."""
    settings = train_settings(epochs=1)
    state = create_state(settings, CPU, 0)
    path = Path(FOLD, "last.pth")
    restore(state, path, settings, load_data(settings))
    return str(sum(float(weight.double().sum()) for weight in state.model.parameters()))


def read_initial_weights() -> str:
    """Create a network from a file of weights, as `train --pretrained FILE` does."""
    settings = train_settings(pretrained=f"{FOLD}/backbone/model.safetensors")
    find_weights(settings.pretrained, 0)
    model = create_model(settings)
    return str(sum(float(weight.double().sum()) for weight in model.backbone.parameters()))


def open_file(pattern: str) -> str:
    """Open an artifact without its engine, which may need a GPU."""
    (path,) = Path().glob(pattern)
    return str(open_artifact(path, trust=True).engines)


def scores() -> str:
    show_scores(ScoresSettings(output_dir=Path("ensembles")))
    return "shown"


def synthesize_again() -> str:
    synth(build(SynthSettings, {"output_dir": "data", "images": 240, "positives": 60,
                                "test_images": 12}))  # fmt: skip
    return "kept"


def _exit_on_code(code: int | None) -> None:
    if code:
        raise SystemExit(code)


def digest_of_outputs(folder: Path, pattern: str = "*") -> str:
    """Return a digest of the tables in a folder. Raise PartialOutput if one is not whole."""
    digests = []
    for path in sorted(folder.rglob(pattern)):
        if path.suffix in CHECKS:
            CHECKS[path.suffix](path)
            digests.append(sha256(path))
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def _check_submission(path: Path) -> None:
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    values = [float(row["target"]) for row in rows]
    if not values or not all(0 <= value <= 1 for value in values):
        raise PartialOutput(f"{path} holds scores that are none")


def _check_parquet(path: Path) -> None:
    table = read_parquet(path)
    if "logit" in table.columns and not all(map(math.isfinite, table["logit"])):
        raise PartialOutput(f"{path} holds logits that are not finite")


CHECKS = {".csv": _check_submission, ".parquet": _check_parquet}
"""How the outputs are checked, by suffix."""


@dataclass(frozen=True)
class Target:
    """A file to break, and what reads it."""

    path: str
    """Pattern of the file in the folder of the project, as names may have a version in them."""
    kind: str
    """Its format, a key of `mutations.CHANGES`."""
    read: Callable[[], str]
    """Reads it as a command does, in a copy of the project. Returns a digest of the result."""
    parts: tuple[str, ...]
    """The parts of the project, see `valid.PARTS`, that it reads."""
    is_guarded: bool = False
    """Whether a digest of the file is kept elsewhere, so that no other content may be used."""
    may_be_left_out: bool = False
    """Whether the result without the file is right too."""
    words: tuple[str, ...] = ()
    """Words of which a refusal must have one; the file's name by default."""

    @property
    def names(self) -> Sequence[str]:
        return (Path(self.path).name, *self.words)

    def find(self) -> Path:
        """Return the file, in the working directory."""
        (path,) = Path().glob(self.path)
        return path


def _guarded(path: str, read: Callable[[], str], *parts: str) -> Target:
    return Target(path, "bytes", read, parts, is_guarded=True, words=(Path(path).suffix,))


def _in_ensemble(name: str, read: Callable[[], str]) -> Target:
    """Return the target of a file that the manifest of an ensemble lists."""
    return _guarded(f"ensembles/{name}", read, "data", "embeddings", "ensembles")


def _in_bundle(name: str, kind: str) -> Target:
    """Return the target of a file that the manifest of a bundle lists."""
    path, parts = f"bundle/{name}", ("data", "bundle")
    is_network = name.startswith("networks")
    return Target(path, kind, submit_bundle, parts, is_guarded=True, may_be_left_out=is_network)


TABLES = ("data", "tables")
RUNS = ("data", "runs", "artifacts")
SCORING = ("data", "embeddings", "ensembles")
EMBEDDING = (*RUNS, "embeddings")
PICTURES = (*RUNS, "pictures")
BUNDLE = ("data", "bundle")

ALL_TARGETS: Mapping[str, Target] = {
    "image.jpeg": Target("pictures/a.jpg", "jpeg", lambda: embed_picture("a.jpg"), PICTURES),
    "image.png": Target("pictures/b.png", "png", lambda: embed_picture("b.png"), PICTURES),
    "image.webp": Target("pictures/c.webp", "webp", lambda: embed_picture("c.webp"), PICTURES),
    "images.hdf5": Target(
        "data/train-image.hdf5", "hdf5", embed, RUNS, words=("images cannot be used",)
    ),
    "masks.hdf5": Target("data/masks.hdf5", "hdf5", read_masks, ("data",)),
    "metadata.csv": Target("data/test-metadata.csv", "csv", lambda: predict("tables"), SCORING),
    "metadata.parquet": Target(
        "tables/train-metadata.parquet", "parquet", read_training_parquet, TABLES, words=("target", "patients")),
    "sample_submission.csv": Target(
        "data/sample_submission.csv", "csv", lambda: predict("tables"), SCORING
    ),
    "folds.parquet": Target(
        f"{RUN}/folds.parquet", "parquet", read_fold_plan, RUNS, is_guarded=True
    ),
    "trained_on.parquet": Target(
        f"{EMBEDDED}/train/fold_0/trained_on.parquet",
        "parquet",
        lambda: read_training(features="image", embeddings=EMBEDDED),
        ("data", "embeddings"), words=(EMBEDDED,)),
    "part.parquet": Target(
        f"{EMBEDDED}/test/fold_0/part-00000.parquet", "parquet", predict_with_images, SCORING, words=(EMBEDDED,)),
    "config.yaml": Target("tables/my_config.yaml", "yaml", read_train_config, TABLES),
    "saved_config.yaml": Target(f"{FOLD}/config.yaml", "yaml", read_finished_fold, RUNS, words=("fold_0",)),
    "history.jsonl": Target(f"{FOLD}/history.jsonl", "text", read_finished_fold, RUNS, words=("fold_0",)),
    "define.yaml": Target(
        "tables/mine.yaml",
        "yaml",
        lambda: read_training(features="raw,mine", define="tables/mine.yaml"),
        TABLES,
        words=("mine", "the definition of"),
    ),
    "table.csv": Target(
        "tables/own.csv",
        "csv",
        lambda: read_training(features="raw,own", tables="label_free:tables/own.csv"),
        TABLES,
        words=("own",),
    ),
    "table.parquet": Target(
        "tables/more.parquet",
        "parquet",
        lambda: read_training(features="raw,more", tables="label_free:tables/more.parquet"),
        TABLES,
        words=("more",),
    ),
    "augmentation.json": Target(
        "tables/augment.json", "json", read_augmentation, TABLES, words=("--augmentation",)
    ),
    "artifact.json": Target(
        f"{FOLD}/model.onnx.json", "json", lambda: embed_with(RUN, format="onnx"), PICTURES, words=(RUN,)),
    "run.json": Target(f"{EMBEDDED}/test/run.json", "json", predict_with_images, SCORING, words=(EMBEDDED,)),
    "plan.json": Target(
        f"{EMBEDDED}/train/plan.json", "json", lambda: embed("embeddings", folds="all"), EMBEDDING, words=(EMBEDDED,)),
    "ensemble.json": Target(
        "ensembles/three/ensemble.json", "json", lambda: predict("three"), SCORING, words=("ensembles/three",)),
    "images.ensemble.json": Target(
        "ensembles/images/ensemble.json", "json", predict_with_images, SCORING, words=(EMBEDDED, "ensembles/images")),
    "blend.json": Target(
        "ensembles/final/ensemble.json", "json", lambda: predict_with_images("final"), SCORING,
        words=(EMBEDDED, "ensembles/final")),
    "scores.ensemble.json": Target("ensembles/tables/ensemble.json", "json", scores, SCORING, words=("ensembles",)),
    "submission.json": Target(
        "submissions/submission.csv.json",
        "json",
        lambda: predict("tables", Path("submissions/submission.csv")),
        (*SCORING, "submissions"),
        words=("submission.csv",),
    ),
    "synth.json": Target("data/synth.json", "json", synthesize_again, ("data",), words=("data",)),
    "bundle.json": Target("bundle/bundle.json", "json", submit_bundle, BUNDLE, words=("bundle",)),
    "bundle.onnx": _in_bundle(f"networks/{NETWORK}/fold_0/model.onnx", "bytes"),
    "bundle.artifact.json": _in_bundle(f"networks/{NETWORK}/fold_0/model.onnx.json", "json"),
    "bundle.ensemble.json": _in_bundle("ensembles/final/ensemble.json", "json"),
    "best_model.pth": Target(f"{FOLD}/best_model.pth", "tensors", read_best_checkpoint, RUNS),
    "last.pth": Target(f"{FOLD}/last.pth", "tensors", read_last_checkpoint, RUNS),
    "weights.safetensors": Target(
        f"{FOLD}/backbone/model.safetensors", "safetensors", read_initial_weights, RUNS
    ),
    "model.onnx": _guarded(f"{FOLD}/model.onnx", lambda: embed_picture("a.jpg"), *PICTURES),
    "model.aoti": _guarded(
        f"runs_aoti/{NETWORK}/fold_0/model.*.pt2",
        lambda: embed_with(f"runs_aoti/{NETWORK}", format="aoti", trust=True),
        *("data", "runs", "artifacts", "pictures", "runs_aoti"),
    ),
    "model.tensorrt_rtx": _guarded(
        f"runs_tensorrt_rtx/{NETWORK}/fold_0/*.plan",
        lambda: open_file(f"runs_tensorrt_rtx/{NETWORK}/fold_0/*.plan"),
        *("data", "runs", "artifacts", "runs_tensorrt_rtx"),
    ),
    "booster.lightgbm": _in_ensemble(
        "three/lightgbm_fold_0_seed_0.txt", lambda: predict("three")
    ),
    "booster.xgboost": _in_ensemble("three/xgboost_fold_0_seed_0.json", lambda: predict("three")),
    "booster.catboost": _in_ensemble(
        "three/catboost_fold_0_seed_0.json", lambda: predict("three")
    ),
    "state.json": _in_ensemble("images/state.json", predict_with_images),
    "maps.parquet": _in_ensemble(f"images/maps_aligned_{NETWORK}.parquet", predict_with_images),
    "calibration.json": _in_ensemble("images/calibration.json", predict_with_images),
    "training.json": _in_ensemble("images/training.json", predict_with_images),
    "oof.parquet": _in_ensemble("images/oof.parquet", predict_with_images),
}  # fmt: skip
NEEDED_MODULES = {"model.tensorrt_rtx": "tensorrt_rtx"}
"""Modules without which the files of a target cannot be made."""
TARGETS = {
    name: target
    for name, target in ALL_TARGETS.items()
    if name not in NEEDED_MODULES or find_spec(NEEDED_MODULES[name])
}
