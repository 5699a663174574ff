import json
from pathlib import Path

import numpy as np
import polars as pl
import torch

from isic.folds import read_folds
from isic.layout import BEST_CHECKPOINT
from isic.metrics import pauc
from isic.runtime.files import read_manifest
from tests.support.commands import tiny_settings
from train.checkpoint import CHECKPOINT_KEYS, load_checkpoint
from train.decoded import DecodedImages
from train.loaders import LesionImages
from train.model import create_model, preprocess_spec
from train.rows import load_data


def test_a_fold_leaves_the_files_of_the_contract(trained: Path, synth_dataset: Path) -> None:
    names = {path.name for path in (trained / "fold_0").iterdir()}
    assert names >= {
        BEST_CHECKPOINT,
        BEST_CHECKPOINT + ".json",
        "last.pth",
        "history.jsonl",
        "oof.parquet",
        "config.yaml",
    }
    checkpoint = torch.load(trained / "fold_0" / BEST_CHECKPOINT, weights_only=True)
    assert set(CHECKPOINT_KEYS) == set(checkpoint)
    manifest = read_manifest(trained / "fold_0" / BEST_CHECKPOINT)
    assert manifest["folds_digest"] == read_folds(trained / "folds.parquet").digest
    history = [
        json.loads(line) for line in (trained / "fold_0" / "history.jsonl").read_text().splitlines()
    ]
    assert [entry["epoch"] for entry in history] == [1]
    assert {"loss", "pauc", "auc", "images_per_second", "waiting_share"} <= set(history[0])


def test_every_row_is_held_out_once_and_scored_by_the_saved_weights(
    trained: Path, synth_dataset: Path
) -> None:
    settings = tiny_settings(
        data=synth_dataset, output_dir=trained.parent, name="tiny", num_folds=3
    )
    data = load_data(settings)
    oof = pl.concat([pl.read_parquet(trained / f"fold_{k}" / "oof.parquet") for k in range(3)])
    assert sorted(oof["isic_id"]) == sorted(data.table["isic_id"])
    assert (read_folds(trained / "folds.parquet").of(oof) == oof["fold"]).all()

    checkpoint = load_checkpoint(trained / "fold_1" / BEST_CHECKPOINT)
    model = create_model(settings, pretrained=False)
    model.load_state_dict(checkpoint["model_state_dict"])
    images = LesionImages(data.target, DecodedImages(data.rows, preprocess_spec(settings)))
    rows = np.flatnonzero(data.fold == 1)[:5]
    pixels = torch.from_numpy(np.stack([images[int(row), 0][0] for row in rows]))
    with torch.inference_mode():
        logits = model.eval()(pixels)[1].squeeze(1).numpy()
    saved = (
        oof.filter(pl.col("isic_id").is_in(data.table["isic_id"][rows].implode()))
        .sort("isic_id")["logit"]
        .to_numpy()
    )
    order = np.argsort(data.table["isic_id"][rows].to_numpy())
    np.testing.assert_allclose(logits[order], saved, atol=1e-5)
    assert checkpoint["best_pauc"] == pauc(
        *(oof.filter(pl.col("fold") == 1)[name] for name in ("target", "logit"))
    )
