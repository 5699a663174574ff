"""The report: that its charts are the scores', that it shows the right lesions, and how it looks in a browser."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray
from playwright.sync_api import Browser
from sklearn.decomposition import PCA
from sklearn.metrics import average_precision_score

from infer.embedding.store import scan_embeddings, shard_path, write_shard
from infer.ensemble.boosters import LIBRARIES
from infer.ensemble.fit import fit_ensemble
from infer.report import write_report
from infer.report.cases import NUM_CASES, NUM_OTHERS, worst_false_alarms, worst_misses
from infer.report.curves import pca, reliability, roc, scored_region, wilson
from infer.report.figures import distribution_figure, reliability_figure, roc_figure
from infer.report.importance import by_group, importance
from infer.report.maps import MOST, draw, projections
from infer.report.markup import Markup, join, tag
from infer.report.plot import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, path, stairs
from isic.dataset import Dataset
from isic.metadata import with_patient
from isic.metrics import pauc, roc_auc, top_k
from isic.runtime.errors import UserError
from tests.support.browser import WIDTHS, look
from tests.support.commands import Cli
from tests.support.datasets import jpeg, write_hdf5
from tests.support.ensembles import fit_settings, write_dataset, write_embeddings

NASTY = "<script>alert(1)</script>\"'&amp;<img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables alone, with markup where text may stand."""
    root = write_dataset(tmp_path_factory.mktemp("report") / "data")
    file = root / "train-metadata.csv"
    table = pl.read_csv(file, infer_schema=False)
    table.with_columns(pl.lit(NASTY).alias("iddx_full"), pl.col("patient_id") + "<b>").write_csv(
        file
    )
    return root


@pytest.fixture(scope="module")
def embeddings(data: Path) -> Path:
    root = write_embeddings(data.parent / "embeddings" / "tiny", data)
    rng = np.random.default_rng(0)
    for (fold,), rows in (
        scan_embeddings(root, "train", ["logit"]).collect().group_by("fold", maintain_order=True)
    ):
        features = rng.standard_normal((len(rows), 8)).astype(np.float16)
        logits = rows["logit"].to_numpy()
        write_shard(
            shard_path(root, "train", int(str(fold)), 0),
            rows["isic_id"].to_list(),
            features,
            logits,
        )
    return root


@pytest.fixture(scope="module")
def fitted(data: Path, embeddings: Path) -> Path:
    chosen = {"features": "multimodal", "embeddings": embeddings, "seeds": 2}
    return fit_ensemble(fit_settings(data, data.parent, name="a <i>&amp;", **chosen))


@pytest.fixture(scope="module")
def page(fitted: Path, data: Path, embeddings: Path) -> str:
    return write_report(fitted, data, embeddings).read_text()


@pytest.fixture(scope="module")
def oof(fitted: Path, data: Path) -> pl.DataFrame:
    patients = Dataset(data).metadata("train").select("isic_id", "patient_id")
    return pl.read_parquet(fitted / "oof.parquet").join(
        patients, on="isic_id", maintain_order="left"
    )


@pytest.fixture(scope="module")
def with_images(data: Path, embeddings: Path, fitted: Path, oof: pl.DataFrame) -> Path:
    """The report of a dataset with images: the worst miss has none, the next one is cut short."""
    ids = oof["isic_id"].to_list()
    absent, cut = (
        case.lesion.name for case in worst_misses(oof, Dataset(data).metadata("train"), 2)
    )
    files = {name: jpeg(40 + row % 30, seed=row) for row, name in enumerate(ids) if name != absent}
    files[cut] = files[cut][: len(files[cut]) // 2]
    root = data.parent / "with_images"
    root.mkdir()
    (root / "train-metadata.csv").write_bytes((data / "train-metadata.csv").read_bytes())
    write_hdf5(root / "train-image.hdf5", files)
    return write_report(copied(fitted, data.parent / "copy"), root, embeddings)


def copied(root: Path, to: Path) -> Path:
    return Path(shutil.copytree(root, to))


def chart(page: str, title: str) -> str:
    return page.partition(f"<h3>{title}</h3>")[2].partition("</figure>")[0]


def drawn(chart: str, class_: str, y_low: float = 0.0) -> NDArray[np.float64]:
    """The last path of a class in the units of its axes, [N, 2]."""
    data = re.findall(rf'd="M([^"]*?)Z?" class="(?:line|area) {class_}"', chart)[-1]
    x, y = np.array([point.split() for point in data.split("L")], dtype=float).T
    right, up = (x - LEFT) / (WIDTH - LEFT - RIGHT), (HEIGHT - BOTTOM - y) / (HEIGHT - TOP - BOTTOM)
    return np.stack([right, y_low + up * (1 - y_low)], axis=1)


def polygon_area(points: NDArray[np.float64]) -> float:
    x, y = points.T
    return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)


@pytest.mark.parametrize(("title", "y_low"), [("ROC", 0.0), ("The scored part", 0.8)])
def test_the_filled_area_is_the_partial_auc(
    page: str, oof: pl.DataFrame, title: str, y_low: float
) -> None:
    area = polygon_area(drawn(chart(page, title), "scored", y_low))
    assert area == pytest.approx(pauc(oof["target"], oof["blend"]), abs=1e-3)


@pytest.mark.parametrize("strength", [0.0, 0.5, 3.0])
def test_the_scored_region_has_the_area_of_any_score(strength: float) -> None:
    rng = np.random.default_rng(0)
    target = (np.arange(500) < 60).astype(np.int8)
    score = np.round(strength * target + rng.standard_normal(500), 1)  # with ties
    assert polygon_area(np.stack(scored_region(*roc(target, score)), axis=1)) == pytest.approx(
        pauc(target, score)
    )


def test_the_curves_have_the_areas_of_the_scores(page: str, oof: pl.DataFrame) -> None:
    curve = drawn(chart(page, "ROC"), "whole")
    assert np.trapezoid(curve[:, 1], curve[:, 0]) == pytest.approx(
        roc_auc(oof["target"], oof["blend"]), abs=1e-3
    )
    recall, precision = drawn(chart(page, "Precision and recall"), "whole").T
    expected = average_precision_score(oof["target"], oof["blend"])
    assert np.trapezoid(precision, recall) == pytest.approx(expected, abs=2e-3)
    assert chart(page, "ROC").count('class="line part"') == oof["fold"].n_unique()


def test_the_tables_hold_the_scores(page: str, oof: pl.DataFrame) -> None:
    def line(name: str, rows: pl.DataFrame, model: str) -> str:
        values = (
            f"{pauc(rows['target'], rows[model]):.4f}",
            f"{roc_auc(rows['target'], rows[model]):.4f}",
        )
        top = top_k(rows["target"], rows[model], rows["patient_id"])
        shares = (
            f"{100 * share:.1f}\N{NO-BREAK SPACE}%" for share in (top.by_lesion, top.by_patient)
        )
        return f'<th scope="row">{name}</th>' + "".join(
            f"<td>{value}</td>" for value in (*values, *shares)
        )

    for (fold,), rows in oof.group_by("fold"):
        assert (
            line(str(fold), rows, "blend") + f"<td>{len(rows)}</td><td>{rows['target'].sum()}</td>"
            in page
        )
    for model in ("lightgbm_seed_0", "lightgbm_seed_1", "blend"):
        assert line(model, oof, model) in page
    assert line("pooled", oof, "blend") in page


def test_the_worst_are_shown_with_their_patients_other_lesions(
    oof: pl.DataFrame, data: Path
) -> None:
    metadata = Dataset(data).metadata("train")
    misses, alarms = worst_misses(oof, metadata), worst_false_alarms(oof, metadata)
    assert len(misses) == len(alarms) == NUM_CASES
    scores = {label: rows["blend"].sort() for (label,), rows in oof.group_by("target")}
    assert [case.lesion.score for case in misses] == scores[1].head(NUM_CASES).to_list()
    assert [case.lesion.score for case in alarms] == scores[0].tail(NUM_CASES).reverse().to_list()
    for case in (*misses, *alarms):
        mine = oof.filter(patient_id=case.patient).sort("blend", descending=True)
        assert case.num_lesions == len(mine) and mine["isic_id"][case.rank - 1] == case.lesion.name
        others = mine.filter(pl.col("isic_id") != case.lesion.name).head(NUM_OTHERS)
        assert [lesion.name for lesion in case.others] == others["isic_id"].to_list()
        assert case.row["isic_id"] == case.lesion.name
        beaten = oof.filter(pl.col("target") != case.lesion.target)["blend"] < case.lesion.score
        assert case.beaten == pytest.approx(beaten.mean())


def test_a_lesion_of_nobody_is_its_own_patient() -> None:
    metadata = pl.DataFrame(
        {"isic_id": ["a", "b", "c"], "target": [1, 0, 0], "patient_id": [None, "p", "p"]}
    )
    scored = with_patient(metadata).with_columns(blend=pl.Series([0.1, 0.9, 0.2]))
    (miss,) = worst_misses(scored, metadata)
    assert (miss.patient, miss.rank, miss.num_lesions, miss.others) == (None, 1, 1, ())


def test_nothing_in_the_data_becomes_markup(page: str, with_images: Path) -> None:
    for text in (page, with_images.read_text()):
        assert (
            "<script" not in text
            and "<img src=x" not in text
            and "<i>" not in text
            and "<b>&quot;" not in text
        )
        assert "&lt;script&gt;alert(1)&lt;/script&gt;&quot;" in text
    assert "<h1>a &lt;i&gt;&amp;amp;</h1>" in page
    assert tag("p", "<", Markup("<br>"), title='"') == '<p title="&quot;">&lt;<br></p>'
    assert join("&", tag("img", alt=None, stroke_width=1.04)) == '&amp;<img stroke-width="1">'


@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_sound_in_a_browser(
    browser: Browser, fitted: Path, data: Path, with_images: Path, width: int
) -> None:
    seen = look(browser, with_images, width)
    seen.assert_sound()
    text = with_images.read_text()
    assert seen.num_images == text.count('src="data:image/jpeg;base64,') > NUM_CASES
    assert ">no image for this id</div>" in text and ">truncated JPEG</div>" in text
    without = write_report(fitted, data)
    tables_only = look(browser, without, width, "dark")
    tables_only.assert_sound()
    assert tables_only.num_images == 0
    assert "This dataset has no images." in without.read_text()


def test_real_lesions_in_a_browser(browser: Browser, real_data: Path, tmp_path: Path) -> None:
    data = real_data / "real-pairs"
    root = fit_ensemble(fit_settings(data, tmp_path, features="numeric", num_rounds=10))
    seen = look(browser, write_report(root, data), 390)
    seen.assert_sound()
    assert seen.num_images >= 2 * NUM_CASES


def test_the_same_inputs_give_the_same_bytes(
    with_images: Path, embeddings: Path, data: Path
) -> None:
    before = with_images.read_bytes()
    write_report(with_images.parent, data.parent / "with_images", embeddings)
    assert with_images.read_bytes() == before


def test_images_that_cannot_be_opened_leave_the_rest(
    data: Path, fitted: Path, tmp_path: Path
) -> None:
    root = tmp_path / "damaged"
    root.mkdir()
    (root / "train-metadata.csv").write_bytes((data / "train-metadata.csv").read_bytes())
    (root / "train-image.hdf5").write_bytes(b"not HDF5")
    assert (
        "The images cannot be read: "
        in write_report(copied(fitted, tmp_path / "copy"), root).read_text()
    )


def test_what_the_command_says(
    data: Path, fitted: Path, embeddings: Path, tmp_path: Path, cli: Cli
) -> None:
    root = copied(fitted, tmp_path / "copy")
    ended = cli("infer", "report", "--ensemble", root, "--data", data)
    assert ended.out == f"report: {root / 'report.html'}\n"
    assert "Not drawn" in (root / "report.html").read_text()
    ended = cli("infer", "report", "--ensemble", root, "--data", data, "--embeddings", embeddings)
    assert "<h3>Fold 2</h3>" in (root / "report.html").read_text()
    ended = cli("infer", "report", "--ensemble", data, "--data", data)
    assert ended.code == 2 and "no finished ensemble" in ended.err
    other = write_dataset(tmp_path / "other", num_train=100, num_positives=20)
    ended = cli("infer", "report", "--ensemble", root, "--data", other)
    assert ended.code == 2 and "lacks 300 of the scored rows" in ended.err
    strange = write_embeddings(tmp_path / "strange", other)
    ended = cli("infer", "report", "--ensemble", root, "--data", data, "--embeddings", strange)
    assert ended.code == 2 and "fold plan" in ended.err


def test_without_trees_and_without_images(data: Path, embeddings: Path, tmp_path: Path) -> None:
    image = fit_ensemble(fit_settings(data, tmp_path, features="image", embeddings=embeddings))
    assert "There are no trees" in write_report(image, data).read_text()
    tabular = fit_ensemble(fit_settings(data, tmp_path, features="numeric", num_rounds=2))
    assert "so there is none to map" in write_report(tabular, data, embeddings).read_text()


@pytest.mark.parametrize(
    ("features", "sentence"),
    [
        ("numeric", "by boosters that were fitted without the patient."),
        ("image", "by an image model that was trained without the patient."),
        ("numeric,image", "so the independence is not complete."),
    ],
)
def test_the_report_does_not_claim_more_independence_than_there_is(
    data: Path, embeddings: Path, tmp_path: Path, features: str, sentence: str
) -> None:
    chosen = {"features": features, "embeddings": embeddings, "num_rounds": 2, "name": "it"}
    page = write_report(fit_ensemble(fit_settings(data, tmp_path, **chosen)), data).read_text()
    assert sentence in page
    assert "never saw the patient" not in page


def test_reliability_of_scores_that_are_probabilities() -> None:
    rng = np.random.default_rng(0)
    score = rng.beta(0.5, 20, 20_000)
    target = (rng.random(len(score)) < score).astype(np.int8)
    bins = reliability(target, score, np.arange(len(score)))
    assert len(bins.num_rows) == 10 and bins.num_rows.sum() == len(score)
    assert np.average(bins.observed, weights=bins.num_rows) == pytest.approx(target.mean())
    assert np.average(bins.mean_score, weights=bins.num_rows) == pytest.approx(score.mean())
    promised = bins.mean_score * bins.num_rows
    np.testing.assert_allclose(promised, promised.mean(), rtol=0.02)
    assert ((bins.low < bins.mean_score) & (bins.mean_score < bins.high)).sum() >= 8
    assert len(reliability(target, np.zeros(len(score)), target).num_rows) == 1


def test_calibration_bars_are_wider_when_lesions_of_a_patient_are_alike() -> None:
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(100), 20)
    score = np.repeat(rng.uniform(0, 1, 100), 20)
    target = np.repeat(rng.random(100) < score[::20], 20).astype(np.int8)
    alike, alone = (reliability(target, score, group) for group in (patient, np.arange(2000)))
    inside = [
        np.mean((bins.low < bins.mean_score) & (bins.mean_score < bins.high))
        for bins in (alike, alone)
    ]
    assert inside[0] >= 0.9 and inside[1] < 0.6
    low, high = wilson(alike.observed, alike.num_rows)
    assert (alike.low <= low).all() and (alike.high >= high).all()


def test_wilson_intervals_are_the_textbooks() -> None:
    low, high = wilson(np.array([0.0, 0.5]), np.array([10, 10]))
    np.testing.assert_allclose(low, [0, 0.2366], atol=1e-4)
    np.testing.assert_allclose(high, [0.2775, 0.7634], atol=1e-4)


def test_rare_lesions_are_drawn_on_a_logarithmic_axis() -> None:
    rng = np.random.default_rng(0)
    target = (np.arange(20_000) < 20).astype(np.int8)
    score = np.clip(rng.lognormal(-6, 1, len(target)) * (1 + 20 * target), 0, 1)
    table = pl.DataFrame({"target": target, "fold": np.arange(len(target)) % 2, "blend": score})
    bins = reliability(target, score, np.arange(len(target)))
    for drawn_figure in (reliability_figure(table, bins), distribution_figure(table)):
        assert ">10⁻³</text>" in drawn_figure and ">0.6</text>" not in drawn_figure
    one_sided = table.with_columns(fold=pl.col("target"))
    assert 'class="line part"' not in roc_figure(one_sided)


def test_gains_add_up_and_go_to_their_groups(fitted: Path) -> None:
    manifest, state = (
        json.loads((fitted / name).read_text()) for name in ("ensemble.json", "state.json")
    )
    table = importance(fitted, manifest["boosters"], state["names"])
    assert table["share"].sum() == pytest.approx(1) and table["share"].is_sorted(descending=True)
    assert set(table["feature"]) == set(state["names"])
    groups = dict(by_group(table).select("group", "share").iter_rows())
    mine = table.filter(pl.col("feature").is_in(["image_score", "image_score_patient_diff"]))
    assert groups["image"] == pytest.approx(mine["share"].sum()) and groups["image"] > 0.2
    assert importance(fitted, [], []).is_empty()


def drawn_table() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((400, 5)).astype(np.float32)
    return matrix, (matrix[:, 2] + 0.5 * matrix[:, 4] + rng.standard_normal(400) > 0).astype(
        np.int64
    )


def test_gains_of_xgboost_are_its_own() -> None:
    xgboost = pytest.importorskip("xgboost")
    matrix, target = drawn_table()
    options = {"objective": "binary:logistic", "max_depth": 3, "nthread": 1}
    booster = xgboost.train(
        options, xgboost.DMatrix(matrix, target, feature_names=list("abcde")), 10
    )
    gains = LIBRARIES["xgboost"].gains(bytes(booster.save_raw("json")).decode(), 5)
    own = booster.get_score(importance_type="total_gain")
    np.testing.assert_allclose(gains, [own.get(name, 0) for name in "abcde"], rtol=1e-5)


def test_gains_of_catboost_are_its_own(tmp_path: Path) -> None:
    catboost = pytest.importorskip("catboost")
    matrix, target = drawn_table()
    options = {
        "iterations": 20,
        "depth": 4,
        "scale_pos_weight": 2.6,
        "loss_function": "Logloss",
        "thread_count": 1,
    }
    model = catboost.CatBoost({**options, "logging_level": "Silent", "allow_writing_files": False})
    model.fit(catboost.Pool(matrix, target))
    model.save_model(str(tmp_path / "model.json"), format="json")
    gains = LIBRARIES["catboost"].gains((tmp_path / "model.json").read_text(), 5)
    np.testing.assert_allclose(100 * gains / gains.sum(), model.get_feature_importance(), rtol=1e-5)


def test_principal_components_are_scikit_learns() -> None:
    features = np.random.default_rng(0).standard_normal((50, 6)) * [5, 3, 1, 1, 1, 1]
    ours, theirs = pca(features), PCA(2).fit(features)
    np.testing.assert_allclose(np.abs(ours.points), np.abs(theirs.transform(features)), atol=1e-9)
    assert ours.explained == pytest.approx(tuple(theirs.explained_variance_ratio_))
    for small in (features[:1], np.ones((4, 3)), features[:, :1]):
        assert pca(small).points.shape == (len(small), 2) and np.isfinite(pca(small).points).all()


def test_a_map_shows_each_fold_its_own_lesions(embeddings: Path, oof: pl.DataFrame) -> None:
    maps = {fold: rows for fold, _, rows in projections(embeddings, oof)}
    assert sorted(maps) == [0, 1, 2]
    for fold, rows in maps.items():
        assert set(rows["isic_id"]) == set(oof.filter(fold=fold)["isic_id"])
    many = pl.DataFrame(
        {
            "isic_id": [f"{row:04d}" for row in range(2000)],
            "target": [row % 2 for row in range(2000)],
        }
    )
    shown = draw(many)
    assert (
        shown.equals(draw(many.reverse()))
        and shown["target"].sum() == MOST[1]
        and len(shown) == sum(MOST.values())
    )


def test_embeddings_that_overflowed_are_left_out(
    embeddings: Path, oof: pl.DataFrame, tmp_path: Path
) -> None:
    root = copied(embeddings, tmp_path / "overflowed")
    part = shard_path(root, "train", 1, 0)
    table = pl.read_parquet(part)
    features = np.array(table["features"].to_numpy())
    features[0] = np.inf
    write_shard(part, table["isic_id"].to_list(), features, table["logit"].to_numpy())
    maps = {fold: rows for fold, _, rows in projections(root, oof)}
    assert len(maps[1]) == len(table) - 1 and table["isic_id"][0] not in maps[1]["isic_id"]


def test_paths_leave_out_what_changes_nothing() -> None:
    points = np.array([[0, 0], [0, 0.04], [0, 5], [0, 10], [3, 10], [7.26, 10]])
    assert path(points) == "M0 0L0 10L7.3 10"
    x, y = stairs([0, 0.5, 1], [1, 0.8, 0.4])
    assert np.trapezoid(y, x) == pytest.approx(0.5 * 0.8 + 0.5 * 0.4)


def test_no_ensemble_is_said_so(tmp_path: Path, data: Path) -> None:
    with pytest.raises(UserError, match="no finished ensemble"):
        write_report(tmp_path, data)
