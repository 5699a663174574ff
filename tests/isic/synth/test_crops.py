"""Crops show their rows, and a cue that the rows lack."""

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from isic import schema
from isic.dataset import Dataset
from isic.metrics import roc_auc
from isic.preprocess import decode
from isic.synth.crops import Crop, crop_specs, render
from isic.synth.rows import SyntheticRows
from tests.support.synthetic import crops_of, draw_synthetic, measured, out_of_fold


def test_sizes(synth_dataset: Path) -> None:
    lengths = []
    sides = []
    for _, jpeg, mask in crops_of(synth_dataset, "train"):
        image = decode(jpeg)
        lesion = cv2.imdecode(np.frombuffer(mask, np.uint8), cv2.IMREAD_UNCHANGED)
        assert image.shape[0] == image.shape[1]
        assert lesion.shape == image.shape[:2]
        assert set(np.unique(lesion)) <= {0, 255}
        lengths.append(len(jpeg))
        sides.append(len(image))
    assert min(lengths) >= 1_000
    assert max(lengths) <= 6_500
    assert 2_300 < np.median(lengths) < 3_100
    assert min(sides) >= 51
    assert max(sides) <= 239
    assert 120 < np.median(sides) < 140


def test_crops_have_the_colours_and_areas_of_their_rows(synth_dataset: Path) -> None:
    table = Dataset(synth_dataset).metadata("train")
    rows = {row["isic_id"]: row for row in table.iter_rows(named=True)}
    seen = np.array([measured(jpeg, mask) for _, jpeg, mask in crops_of(synth_dataset, "train")])
    names = [name for name, _, _ in crops_of(synth_dataset, "train")]
    columns = (
        "tbp_lv_L",
        "tbp_lv_A",
        "tbp_lv_B",
        "tbp_lv_Lext",
        "tbp_lv_Aext",
        "tbp_lv_Bext",
        "tbp_lv_areaMM2",
    )
    wanted = np.array([[rows[name][column] for column in columns] for name in names])
    assert np.all(np.abs(seen - wanted)[:, :6].mean(axis=0) < 1.5)  # Lab units
    assert np.median(np.abs(seen[:, 6] / wanted[:, 6] - 1)) < 0.1
    assert np.mean(seen[:, 0] < seen[:, 3]) > 0.98  # a lesion is darker than its skin


def test_the_same_seed_draws_the_same_crop(learnable: SyntheticRows) -> None:
    spec = crop_specs(learnable.table[:1], learnable.cue[:1])[0]
    assert render(spec, (1, 2)) == render(spec, (1, 2)) != render(spec, (1, 3))


def test_the_crop_shows_a_cue_that_the_row_lacks() -> None:
    rows = draw_synthetic(500, 120, seed=5)
    crops = [render(spec, (5, i)) for i, spec in enumerate(crop_specs(rows.table, rows.cue))]
    score = out_of_fold(rows.table, np.array([thumbnail(crop) for crop in crops]))
    target = rows.table["target"].to_numpy()
    assert 0.78 < roc_auc(target, score) < 0.98
    assert np.corrcoef(score, rows.cue)[0, 1] > 0.3
    # Given the label, no column of the row depends on the hidden cue.
    benign = target == 0
    columns = rows.table.select(schema.NUMERIC[1:]).to_numpy()[benign]
    correlation = np.corrcoef(columns.T, rows.cue[benign])[-1, :-1]
    assert np.abs(correlation).max() < 0.2


def thumbnail(crop: Crop) -> NDArray[np.float32]:
    """Return an 8 x 8 Lab thumbnail, and the colours' means and deviations."""
    lab = cv2.cvtColor(decode(crop.jpeg).astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    pixels = lab.reshape(-1, 3)
    small = cv2.resize(lab, (8, 8), interpolation=cv2.INTER_AREA)
    return np.concatenate([small.ravel(), pixels.mean(axis=0), pixels.std(axis=0)])
