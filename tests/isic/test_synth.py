"""The synthetic dataset: layout, marginals, reproducibility, and a learnable target."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import h5py
import lightgbm as lgb
import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from isic import schema
from isic.dataset import Dataset
from isic.folds import draw_folds
from isic.metrics import pauc, roc_auc
from isic.preprocess import decode
from isic.runtime.errors import UserError
from isic.runtime.files import read_json, write_json
from isic.settings import SynthSettings
from isic.synth import FILES, MANIFEST, marginals, synthesize
from isic.synth.crops import Crop, crop_specs, render
from isic.synth.rows import (
    SyntheticRows,
    default_positives,
    draw_rows,
    lesions_per_patient,
    num_patients,
)
from tests.support.commands import Cli
from tests.support.datasets import small_disk

PUBLISHED = {
    "tbp_lv_L": (27.89, 42.34, 56.57),
    "tbp_lv_A": (15.12, 19.80, 24.81),
    "tbp_lv_B": (21.67, 28.17, 34.98),
    "tbp_lv_C": (27.50, 34.82, 41.90),
    "tbp_lv_H": (47.90, 55.04, 61.19),
    "tbp_lv_Hext": (53.75, 61.11, 68.18),
    "tbp_lv_minorAxisMM": (1.49, 2.27, 3.89),
    "tbp_lv_areaMM2": (3.21, 5.69, 15.86),
    "tbp_lv_perimeterMM": (7.48, 10.02, 18.37),
    "tbp_lv_deltaLB": (5.77, 8.70, 14.20),
    "tbp_lv_deltaLBnorm": (5.06, 6.95, 10.85),
}
"""10 %, 50 % and 90 % of the columns that are derived from others, not sampled."""


def draw(
    num_rows: int, num_positives: int, seed: int = 0, unseen_site: bool = False
) -> SyntheticRows:
    patients = [f"IP_{i}" for i in range(num_patients(num_rows))]
    ids = [f"ISIC_{i}" for i in range(num_rows)]
    return draw_rows(ids, patients, num_positives, np.random.default_rng(seed), unseen_site)


@pytest.fixture(scope="module")
def large() -> pl.DataFrame:
    """A table of 20,000 rows with the challenge's share of positives."""
    return draw(20_000, 20).table


@pytest.fixture(scope="module")
def learnable() -> SyntheticRows:
    return draw(3_000, 150)


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (*FILES, MANIFEST)}


def crops_of(folder: Path, split: str) -> Iterator[tuple[str, bytes, bytes]]:
    with (
        h5py.File(folder / f"{split}-image.hdf5") as images,
        h5py.File(folder / "masks.hdf5") as masks,
    ):
        for name in images:
            yield name, images[name][()], masks[name][()]


class TestLayout:
    def test_tables(self, synth_dataset: Path) -> None:
        train = pl.read_csv(synth_dataset / "train-metadata.csv", infer_schema=False)
        test = pl.read_csv(synth_dataset / "test-metadata.csv", infer_schema=False)
        assert tuple(train.columns) == schema.TRAIN_ORDER
        assert len(train.columns) == 55
        assert tuple(test.columns) == tuple(
            c for c in schema.TRAIN_ORDER if c not in schema.TRAIN_ONLY
        )
        assert len(test.columns) == 44
        assert (len(train), len(test)) == (300, 30)
        assert not set(train["isic_id"]) & set(test["isic_id"])
        assert not set(train["patient_id"]) & set(test["patient_id"])

    def test_submission_and_truth_go_with_the_test_table(self, synth_dataset: Path) -> None:
        test = Dataset(synth_dataset).metadata("test")
        sample = pl.read_csv(synth_dataset / "sample_submission.csv")
        truth = pl.read_csv(synth_dataset / "test-truth.csv")
        assert sample.columns == truth.columns == ["isic_id", "target"]
        assert test["isic_id"].equals(sample["isic_id"])
        assert test["isic_id"].equals(truth["isic_id"])
        assert truth["target"].sum() == 2

    def test_images_are_stored_as_the_challenge_stores_them(self, synth_dataset: Path) -> None:
        with h5py.File(synth_dataset / "train-image.hdf5") as file:
            assert len(file) == 300
            for dataset in file.values():
                assert dataset.shape == ()
                assert dataset.dtype.kind == "S"
                assert dataset.chunks is None
                assert dataset.id.get_offset() is not None
        store = Dataset(synth_dataset).images("train")
        assert store.missing(Dataset(synth_dataset).metadata("train")["isic_id"].to_list()) == []

    def test_only_the_test_split_has_the_unseen_attribution(self, synth_dataset: Path) -> None:
        dataset = Dataset(synth_dataset)
        assert marginals.UNSEEN in set(dataset.metadata("test")["attribution"])
        assert set(dataset.metadata("train")["attribution"]) == set(marginals.ATTRIBUTIONS)

    @pytest.mark.parametrize("test_images", [1, 2, 9])
    def test_a_test_split_of_a_few_rows(self, test_images: int, tmp_path: Path) -> None:
        assert synthesize(SynthSettings(output_dir=tmp_path, images=50, test_images=test_images))
        assert len(Dataset(tmp_path).metadata("test")) == test_images

    @pytest.mark.parametrize("images", [50, 120])
    def test_the_smallest_table_still_has_five_folds(self, images: int) -> None:
        rows = draw(images, default_positives(images))
        assert draw_folds(rows.table, 5, 42).num_folds == 5


class TestRows:
    def test_identities(self, large: pl.DataFrame) -> None:
        t = {name.removeprefix("tbp_lv_"): large[name].to_numpy() for name in schema.NUMERIC}
        for end in ("", "ext"):
            chroma = np.hypot(t[f"A{end}"], t[f"B{end}"])
            np.testing.assert_allclose(t[f"C{end}"], chroma, atol=2e-6)
            hue = np.degrees(np.arctan2(t[f"B{end}"], t[f"A{end}"]))
            np.testing.assert_allclose(t[f"H{end}"], hue, atol=2e-6)
        for axis in "LAB":
            np.testing.assert_allclose(t[f"delta{axis}"], t[axis] - t[f"{axis}ext"], atol=2e-6)
        area_perim_ratio = t["perimeterMM"] ** 2 / t["areaMM2"]
        np.testing.assert_allclose(t["area_perim_ratio"], area_perim_ratio, atol=2e-6)
        assert np.all(t["symm_2axis_angle"] % 5 == 0)
        assert np.ptp(t["symm_2axis_angle"]) == 175
        assert np.array_equal(t["norm_color"] == 0, t["color_std_mean"] == 0)
        assert 0.07 < np.mean(t["norm_color"] == 0) < 0.11
        assert t["deltaL"].max() < 0 < t["L"].min()

    def test_approximate_identities(self, large: pl.DataFrame) -> None:
        t = {name.removeprefix("tbp_lv_"): large[name].to_numpy() for name in schema.NUMERIC}
        relative = t["deltaLB"] / np.hypot(t["deltaL"], t["deltaB"])
        assert np.quantile(relative, 0.01) > 1
        assert np.quantile(relative, 0.99) < 1.08
        axes = np.sqrt(1 - (t["minorAxisMM"] / t["clin_size_long_diam_mm"]) ** 2)
        assert np.corrcoef(axes, t["eccentricity"])[0, 1] > 0.9

    @pytest.mark.parametrize("name", marginals.KNOTS)
    def test_marginals(self, large: pl.DataFrame, name: str) -> None:
        percent = np.array(marginals.KNOT_PERCENT[3:15])
        values = np.array(marginals.KNOTS[name][3:15])
        sampled = np.percentile(large[name].drop_nulls().to_numpy(), percent)
        assert np.abs(sampled - values)[:-2].max() < 0.06 * (values[9] - values[0])

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_marginals_of_columns_that_follow_from_others(
        self, large: pl.DataFrame, name: str
    ) -> None:
        published = np.array(PUBLISHED[name])
        sampled = np.percentile(large[name].to_numpy(), [10, 50, 90])
        assert np.abs(sampled - published).max() < 0.15 * (published[2] - published[0])

    def test_related_columns_correlate(self, large: pl.DataFrame) -> None:
        pairs = [
            ("tbp_lv_L", "tbp_lv_Lext", 0.85),
            ("clin_size_long_diam_mm", "tbp_lv_areaMM2", 0.75),
            ("tbp_lv_color_std_mean", "tbp_lv_norm_color", 0.9),
        ]
        for one, other, least in pairs:
            assert large.select(pl.corr(one, other, method="spearman")).item() > least

    def test_blanks(self, large: pl.DataFrame) -> None:
        blank = {name: large[name].null_count() / len(large) for name in schema.DTYPES}
        assert blank["sex"] == pytest.approx(0.0287)
        assert blank["age_approx"] == pytest.approx(0.0070)
        assert blank["anatom_site_general"] == pytest.approx(0.0144, abs=0.0002)
        unknown = large["tbp_lv_location_simple"] == "Unknown"
        assert large["anatom_site_general"].is_null().equals(unknown)
        assert not any(share for name, share in blank.items() if name.startswith("tbp_lv"))

    def test_categories(self, large: pl.DataFrame) -> None:
        is_white = pl.col("tbp_tile_type") == "3D: white"
        white = dict(large.group_by("attribution").agg(is_white.mean()).iter_rows())
        assert white[marginals.MSKCC] > 0.7
        assert max(white[name] for name in white if name != marginals.MSKCC) < 0.4
        licence = dict(large.select("attribution", "copyright_license").unique().iter_rows())
        assert len(licence) == 7
        assert licence[marginals.ACEMID] == "CC-0"
        assert licence[marginals.BASEL] == "CC-BY-NC"
        for name, (count, *_) in marginals.LOCATIONS.items():
            found = (large["tbp_lv_location"] == name).mean()
            assert found == pytest.approx(count / marginals.FULL_ROWS, abs=2e-4)
        sex = large["sex"].drop_nulls()
        assert (sex == "male").mean() == pytest.approx(0.682, abs=0.02)
        assert set(large["age_approx"].drop_nulls() % 5) == {0}

    def test_train_only_columns(self, large: pl.DataFrame) -> None:
        malignant = large.filter(pl.col("target") == 1)
        benign = large.filter(pl.col("target") == 0)
        assert malignant["lesion_id"].null_count() == 0
        assert benign["lesion_id"].is_not_null().mean() == pytest.approx(0.054, abs=0.006)
        assert set(malignant["iddx_1"]) == {"Malignant"}
        assert set(benign["iddx_1"]) == {"Benign"}
        assert set(large["mel_mitotic_index"].drop_nulls()) <= set(marginals.MITOSES)
        assert malignant["mel_mitotic_index"].drop_nulls().len() > 0
        assert large["tbp_lv_dnn_lesion_confidence"].null_count() == 0

    def test_full_size_figures(self) -> None:
        sizes = lesions_per_patient(
            marginals.FULL_ROWS, num_patients(marginals.FULL_ROWS), np.random.default_rng(0)
        )
        assert sizes.sum() == marginals.FULL_ROWS
        assert len(sizes) == 1_042
        assert np.median(sizes) == pytest.approx(241.5, rel=0.05)
        assert sizes.max() == pytest.approx(9_184, rel=0.05)
        assert default_positives(marginals.FULL_ROWS) == 393
        assert default_positives(3_000) == 150

    @pytest.mark.parametrize("num_positives", [1, 7, 60])
    def test_the_number_of_positives_is_kept(self, num_positives: int) -> None:
        assert draw(120, num_positives).table["target"].sum() == num_positives


class TestCrops:
    def test_sizes(self, synth_dataset: Path) -> None:
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

    def test_crops_show_what_their_rows_say(self, synth_dataset: Path) -> None:
        table = Dataset(synth_dataset).metadata("train")
        rows = {row["isic_id"]: row for row in table.iter_rows(named=True)}
        seen = np.array(
            [measured(jpeg, mask) for _, jpeg, mask in crops_of(synth_dataset, "train")]
        )
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

    def test_the_same_seed_draws_the_same_crop(self, learnable: SyntheticRows) -> None:
        spec = crop_specs(learnable.table[:1], learnable.cue[:1])[0]
        assert render(spec, (1, 2)) == render(spec, (1, 2)) != render(spec, (1, 3))


def measured(jpeg: bytes, mask: bytes) -> list[float]:
    """Return mean Lab inside and outside the lesion, and its area in mm²."""
    lesion = cv2.imdecode(np.frombuffer(mask, np.uint8), cv2.IMREAD_UNCHANGED) > 0
    lab = cv2.cvtColor(decode(jpeg).astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    return [*lab[lesion].mean(axis=0), *lab[~lesion].mean(axis=0), lesion.mean() * 225]


class TestCommand:
    def test_two_runs_give_the_same_bytes(self, tmp_path: Path) -> None:
        for name in ("one", "two"):
            assert synthesize(SynthSettings(output_dir=tmp_path / name, images=60, seed=3))
        assert files(tmp_path / "one") == files(tmp_path / "two")
        synthesize(SynthSettings(output_dir=tmp_path / "three", images=60, seed=4))
        other = files(tmp_path / "three")
        assert all(other[name] != content for name, content in files(tmp_path / "one").items())

    def test_a_second_run_does_nothing(self, synth_dataset: Path, cli: Cli) -> None:
        before = {name: (synth_dataset / name).stat().st_mtime_ns for name in FILES}
        ended = cli("isic", "synth", "--output_dir", synth_dataset, "--images", 300, "--seed", 1)
        assert ended.code == 0
        assert "nothing to do" in ended.out
        assert before == {name: (synth_dataset / name).stat().st_mtime_ns for name in FILES}

    def test_a_killed_run_is_drawn_anew(self, synth_dataset: Path, tmp_path: Path) -> None:
        out = tmp_path / "killed"
        arguments = ["--output_dir", str(out), "--images", "300", "--seed", "1"]
        process = subprocess.Popen([sys.executable, "-m", "isic", "synth", *arguments])
        while not (out / "train-metadata.csv").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert read_json(out / MANIFEST)["unfinished"]
        assert not (out / "train-image.hdf5").exists()
        assert synthesize(SynthSettings(output_dir=out, images=300, seed=1))
        assert files(out) == files(synth_dataset)
        assert not list(out.glob(".*.tmp"))

    def test_an_unfinished_dataset_of_other_settings_is_replaced(self, tmp_path: Path) -> None:
        write_json(tmp_path / MANIFEST, {"unfinished": True, "spec": {}})
        (tmp_path / "train-metadata.csv").write_text("half")
        assert synthesize(SynthSettings(output_dir=tmp_path, images=60))
        assert len(Dataset(tmp_path).metadata("train")) == 60

    def test_a_damaged_file_is_drawn_anew(self, tmp_path: Path) -> None:
        settings = SynthSettings(output_dir=tmp_path, images=60)
        synthesize(settings)
        whole = files(tmp_path)
        (tmp_path / "train-image.hdf5").write_bytes(whole["train-image.hdf5"][:-100])
        assert synthesize(settings)
        assert files(tmp_path) == whole

    def test_a_full_disk_is_a_sentence(self, tmp_path: Path, cli: Cli) -> None:
        with small_disk(tmp_path / "disk", "600k"):
            ended = cli(
                "isic", "synth", "--output_dir", tmp_path / "disk" / "data", "--images", 200
            )
            assert ended.code == 2, ended.err
            assert ended.err.startswith("error: the disk is full"), ended.err

    def test_a_small_pool_is_used_again(self, tmp_path: Path) -> None:
        synthesize(SynthSettings(output_dir=tmp_path, images=400, pool=100, test_images=50))
        crops = {name: (jpeg, mask) for name, jpeg, mask in crops_of(tmp_path, "train")}
        assert len(crops) == 400
        assert 30 < len(set(crops.values())) <= 100
        table = Dataset(tmp_path).metadata("train")
        seen = np.array([measured(*crops[name]) for name in table["isic_id"]])
        for i, (column, least) in enumerate([("tbp_lv_L", 0.8), ("tbp_lv_A", 0.5)]):
            assert np.corrcoef(seen[:, i], table[column].to_numpy())[0, 1] > least

    @pytest.mark.parametrize(
        ("flags", "sentence"),
        [
            (["--images", "20"], "--images: input should be greater than or equal to 50, got '20'"),
            (["--images", "100", "--positives", "100"], "more than half"),
            (["--positives", "0"], "--positives"),
            (["--picture", "3"], 'unknown key "picture"'),
            (["--images", "many"], "--images"),
        ],
    )
    def test_bad_flags(self, flags: list[str], sentence: str, tmp_path: Path, cli: Cli) -> None:
        ended = cli("isic", "synth", "--output_dir", tmp_path / "out", *flags)
        assert ended.code == 2
        assert sentence in ended.err
        assert not (tmp_path / "out").exists()

    def test_a_folder_with_other_data_is_left_alone(
        self, synth_dataset: Path, small_dataset: Path
    ) -> None:
        with pytest.raises(UserError, match="synthetic dataset with other settings"):
            synthesize(SynthSettings(output_dir=synth_dataset, images=300, seed=2))
        before = (small_dataset / "train-metadata.csv").read_bytes()
        with pytest.raises(UserError, match="that is not synthetic"):
            synthesize(SynthSettings(output_dir=small_dataset, images=300))
        assert (small_dataset / "train-metadata.csv").read_bytes() == before


class TestPlantedMalignancy:
    def test_the_patients_other_lesions_tell_more_than_the_row(
        self, learnable: SyntheticRows
    ) -> None:
        table = learnable.table
        raw = table.select(schema.NUMERIC)
        centred = pl.col(schema.NUMERIC) - pl.col(schema.NUMERIC).mean().over(schema.PATIENT)
        relative = table.select(
            centred / (pl.col(schema.NUMERIC).std().over(schema.PATIENT) + 1e-5)
        )
        target = table["target"].to_numpy()
        both = np.hstack([raw.to_numpy(), relative.to_numpy()])
        row_score = pauc(target, out_of_fold(table, raw.to_numpy()))
        relative_score = pauc(target, out_of_fold(table, both))
        assert 0.10 < row_score < 0.15
        assert row_score + 0.01 < relative_score < 0.18

    def test_the_crop_tells_what_the_row_does_not(self) -> None:
        rows = draw(500, 120, seed=5)
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


def out_of_fold(table: pl.DataFrame, features: NDArray[np.generic]) -> NDArray[np.float64]:
    """Score each row with a booster that has not seen its patient."""
    fold = draw_folds(table, 5, 42).of(table).to_numpy()
    target = table["target"].to_numpy()
    score = np.zeros(len(table))
    settings = {
        "objective": "binary",
        "num_threads": 1,
        "verbosity": -1,
        "seed": 0,
        "learning_rate": 0.05,
        "max_depth": 4,
        "num_leaves": 15,
        "feature_fraction": 0.5,
        "min_data_in_leaf": 20,
    }
    for k in np.unique(fold):
        data = lgb.Dataset(features[fold != k], target[fold != k])
        score[fold == k] = lgb.train(settings, data, 120).predict(features[fold == k])
    return score
