"""`infer triage`: its pages, the files it writes, and how they look in a browser."""

import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from playwright.sync_api import Browser

from infer.ensemble.predict import predict_submission
from infer.ensemble.scoring.calibration import out_of_fold_probability
from infer.ensemble.settings import PredictSettings
from infer.triage.charts import find_outliers, keep_apart
from infer.triage.settings import TriageSettings
from infer.triage.triage import triage
from isic import schema
from isic.folds import draw_folds
from isic.html.page import percent
from isic.runtime.errors import UserError
from isic.runtime.files import read_json
from tests.support.browser import WIDTHS, inspect
from tests.support.commands import Cli
from tests.support.datasets import jpeg, write_hdf5
from tests.support.ensembles import (
    NUM_FOLDS,
    fit_small,
    train_table,
    write_dataset,
    write_embeddings,
)
from tests.support.fold_embeddings import write_fold_embeddings

NASTY = "<script>alert(1)</script>../\"'&amp;"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, whose test patients have markup in a name, and an ensemble of it."""
    root = tmp_path_factory.mktemp("triage")
    data = write_dataset(root / "data", num_test=120)
    table = pl.read_csv(data / "test-metadata.csv", infer_schema=False)
    first = table[schema.PATIENT][0]
    renamed = pl.when(pl.col(schema.PATIENT) == first).then(pl.lit(NASTY))
    table = table.with_columns(renamed.otherwise(pl.col(schema.PATIENT)).alias(schema.PATIENT))
    table.write_csv(data / "test-metadata.csv")
    ids = table[schema.ID].to_list()
    files = {name: jpeg(40 + row % 30, seed=row) for row, name in enumerate(ids) if row != 3}
    files[ids[5]] = files[ids[5]][: len(files[ids[5]]) // 2]
    write_hdf5(data / "test-image.hdf5", files)
    embeddings = write_embeddings(root / "embeddings" / "tiny", data)
    fit_small(
        data,
        root,
        features="engineered,image",
        embeddings=[embeddings],
        name="fitted",
        calibrate="platt",
    )
    return root


def write_pages(project: Path, output: Path, **more: object) -> dict[str, str]:
    """Run the command. Returns the pages by name, and the index under its own."""
    defaults = {
        "data": project / "data",
        "ensemble": project / "fitted",
        "embeddings": project / "embeddings" / "tiny",
        "output": output,
        "num_threads": 1,
    }
    triage(TriageSettings.model_validate(defaults | more))
    files = [output, *output.with_suffix("").glob("*.html")]
    return {path.name: path.read_text(encoding="utf-8") for path in files}


@pytest.fixture(scope="module")
def output(project: Path) -> Path:
    write_pages(project, project / "pages.html")
    return project / "pages.html"


def test_each_patient_has_a_page_that_the_index_links_to(project: Path, output: Path) -> None:
    index = output.read_text()
    pages = list(output.with_suffix("").glob("*.html"))
    assert len(pages) == 6
    for page in pages:
        assert f'href="pages/{page.name}"' in index
        text = page.read_text()
        assert 'href="../pages.html"' in text
        assert "not a medical device" in text
        assert "trained on 400 lesions of 40 patients, 60 of the lesions malignant" in text
        assert text.count('class="sheet"') == text.count('start="16"') <= 1
    assert any('class="sheet"' in page.read_text() for page in pages)
    assert "An institution never seen" in index + "".join(page.read_text() for page in pages)
    table = pl.read_csv(project / "data" / "test-metadata.csv", infer_schema=False)
    for name in table[schema.ID]:
        assert sum(name in page.read_text() for page in pages) == 1


def test_nothing_in_the_data_becomes_markup(output: Path) -> None:
    texts = [path.read_text() for path in (output, *output.with_suffix("").glob("*.html"))]
    assert sum("&lt;script&gt;alert(1)" in text for text in texts) == 2
    assert not any("<script" in text for text in texts)


def test_a_page_says_what_the_model_has_not_seen(output: Path) -> None:
    pages = [path.read_text() for path in output.with_suffix("").glob("*.html")]
    (page,) = [text for text in pages if "An institution never seen" in text]
    assert "Outside the model&#x27;s experience" in page
    assert "No training lesion has the source of the photograph" in page


def test_a_page_has_pictures_reasons_and_probabilities(project: Path, output: Path) -> None:
    text = "".join(path.read_text() for path in output.with_suffix("").glob("*.html"))
    assert text.count('src="data:image/jpeg;base64,') == 118
    assert ">no image for this id</div>" in text
    assert ">truncated JPEG</div>" in text
    assert "standard deviations" in text
    assert " → " in text
    assert "calibrated probability" in text
    assert "How the lesions look to the network" in text


def test_an_ensemble_that_cannot_be_explained_has_pages_without_reasons(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = {"features": "raw", "num_rounds": 2, "libraries": "xgboost,lightgbm"}
    linear = "{extra: {linear_tree: true}}"
    root = fit_small(project / "data", tmp_path, **chosen, lightgbm=linear)
    pages = write_pages(project, tmp_path / "t.html", ensemble=root, embeddings=())
    index = pages.pop("t.html")
    assert "ISIC_2" in index + "".join(pages.values())
    assert len(pages) == 6
    for text in pages.values():
        assert "The models cannot explain their scores, so there are no reasons." in text
        assert 'class="why"' not in text
    assert "linear_tree); the pages are without reasons" in capsys.readouterr().err


def test_probabilities_of_train_rows_are_out_of_fold(project: Path, tmp_path: Path) -> None:
    """A curve that was fitted on a row's own label would be too sure of it."""
    chosen = {"features": "raw", "num_rounds": 2, "calibrate": "isotonic", "name": "fitted"}
    root = fit_small(project / "data", tmp_path, **chosen)
    oof = pl.read_parquet(root / "oof.parquet")
    score, target, fold = (oof[name].to_numpy() for name in ("blend", schema.TARGET, "fold"))
    held_out = out_of_fold_probability("isotonic", score, target, fold)
    expected = dict(zip(oof[schema.ID], map(percent, held_out), strict=True))
    more = {"ensemble": root, "embeddings": (), "split": "train"}
    text = "".join(write_pages(project, tmp_path / "t.html", **more).values())
    shown = dict(re.findall(r'class="id">([^<]*)<.*?calibrated probability ([^<]*)<', text, re.S))
    assert len(shown) > 100
    assert shown == {name: expected[name] for name in shown}


def test_the_points_of_train_rows_are_by_the_model_that_held_them_out(
    project: Path, tmp_path: Path
) -> None:
    """Embeddings by every fold's model have a row per fold for a train image too."""
    data = project / "data"
    folds = draw_folds(train_table(data), NUM_FOLDS, 42)
    every = write_fold_embeddings(tmp_path / "every" / "tiny", data, folds, 2.0, 6.0)
    held_out = Path(shutil.copytree(every, tmp_path / "held_out" / "tiny"))
    for path in held_out.glob("train/fold_*/*00000.parquet"):
        k = int(path.parent.name.removeprefix("fold_"))
        own = folds.table.filter(pl.col("fold") == k).select(schema.ID)
        pl.read_parquet(path).join(own, on=schema.ID, how="semi").write_parquet(path)
    root = fit_small(data, tmp_path, features="image", embeddings=[every], name="fitted")
    more = {"ensemble": root, "split": "train", "max_patients": 5}
    pages = [
        write_pages(
            project, tmp_path / name / "t.html", embeddings=tmp_path / name / "tiny", **more
        )
        for name in ("every", "held_out")
    ]
    assert "How the lesions look to the network" in "".join(pages[0].values())
    assert pages[0] == pages[1]


@pytest.mark.browser
@pytest.mark.parametrize("width", WIDTHS)
def test_the_pages_are_sound_in_a_browser(browser: Browser, output: Path, width: int) -> None:
    for path in (output, *output.with_suffix("").glob("*.html")):
        inspect(browser, path, width, "dark" if width < 1000 else "light").assert_sound()


@pytest.mark.browser
def test_the_keyboard_reaches_every_numbered_lesion(browser: Browser, output: Path) -> None:
    path = max(output.with_suffix("").glob("*.html"), key=lambda path: path.stat().st_size)
    page = browser.new_page()
    page.goto(path.resolve().as_uri())
    reached = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.getAttribute('href')"))
    assert {f"#lesion-{number}" for number in range(1, 16)} <= reached
    assert "../pages.html" in reached
    page.close()


@pytest.mark.browser
def test_two_thousand_lesions_of_one_patient(browser: Browser, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", num_test=2000)
    table = pl.read_csv(data / "test-metadata.csv", infer_schema=False)
    table.with_columns(patient_id=pl.lit("IP_1")).write_csv(data / "test-metadata.csv")
    write_hdf5(
        data / "test-image.hdf5",
        {name: jpeg(128, seed=row % 40) for row, name in enumerate(table[schema.ID])},
    )
    fit_small(data, tmp_path, features="raw", name="fitted")
    write_pages(tmp_path, tmp_path / "t.html", embeddings=())
    (path,) = (tmp_path / "t").glob("*.html")
    assert path.stat().st_size < 20e6
    found = inspect(browser, path, 1280)
    found.assert_sound()
    assert found.num_images == 2000


@pytest.mark.browser
def test_real_lesions_in_a_browser(browser: Browser, real_data: Path, tmp_path: Path) -> None:
    """The test split has three rows of three patients."""
    data = real_data / "real-pairs"
    fit_small(data, tmp_path, features="numeric", num_rounds=10, name="fitted")
    for split, number in (("test", 3), ("train", 10)):
        output = tmp_path / f"{split}.html"
        more = {"data": data, "embeddings": (), "split": split, "max_patients": 10}
        pages = write_pages(tmp_path, output, **more)
        assert len(pages) == number + 1
        for path in (output, *output.with_suffix("").glob("*.html")):
            inspect(browser, path, 390).assert_sound()


def test_one_patient_is_chosen_and_earlier_pages_go(project: Path, tmp_path: Path) -> None:
    write_pages(project, tmp_path / "t.html")
    manifest = read_json(tmp_path / "t.html.json")
    pages = write_pages(project, tmp_path / "t.html", patient=NASTY)
    assert len(pages) == 2
    assert len(manifest["pages"]) == 6
    assert read_json(tmp_path / "t.html.json")["pages"] == [
        f"t/{name}" for name in pages if name != "t.html"
    ]


def test_the_highest_scores_come_first(project: Path, tmp_path: Path) -> None:
    data, ensemble = project / "data", project / "fitted"
    embeddings = project / "embeddings" / "tiny"
    output = tmp_path / "s.csv"
    predict_submission(
        PredictSettings(data=data, ensemble=ensemble, embeddings=embeddings, output=output)
    )
    table = pl.read_csv(data / "test-metadata.csv", infer_schema=False)
    scored = table.select(schema.ID, schema.PATIENT).join(pl.read_csv(output), on=schema.ID)
    highest = scored.group_by(schema.PATIENT).agg(pl.col("target").max()).sort("target")
    expected = highest[schema.PATIENT].to_list()[::-1][:2]
    pages = write_pages(project, tmp_path / "t.html", max_patients=2)
    assert len(pages) == 3
    index = pages.pop("t.html")
    assert "2 of 6 patients with 120 lesions" in index
    names = [name if name != NASTY else "script" for name in expected]
    places = [index.index(f">{name}<" if name != "script" else ">&lt;script") for name in names]
    assert places == sorted(places)
    ranked = scored.sort("target", descending=True)[schema.ID].to_list()
    for text in pages.values():
        ids = re.findall(r'class="id">([^<]*)<', text)
        assert [ranked.index(name) for name in ids] == sorted(map(ranked.index, ids))
        assert re.findall(r"rank (\d+) of all 120", text) == [
            str(ranked.index(name) + 1) for name in ids
        ]


def test_a_run_that_fails_leaves_the_earlier_pages(project: Path, tmp_path: Path) -> None:
    before = write_pages(project, tmp_path / "t.html")
    other = write_embeddings(tmp_path / "other" / "tiny", project / "data", seed=9)
    (other / "test" / "fold_0" / "part-00000.parquet").unlink()
    with pytest.raises(UserError):
        write_pages(project, tmp_path / "t.html", patient=NASTY, embeddings=other)
    after = {path.name: path.read_text() for path in (tmp_path / "t").glob("*.html")}
    assert after.items() <= before.items()
    assert len(after) == 6


def test_a_file_among_the_pages_stays(project: Path, tmp_path: Path) -> None:
    write_pages(project, tmp_path / "t.html", patient=NASTY)
    table = pl.read_csv(project / "data" / "test-metadata.csv", infer_schema=False)
    name = next(name for name in table[schema.PATIENT] if name != NASTY)
    (tmp_path / "t" / f"{name}.html").write_text("mine")
    with pytest.raises(UserError, match="was not written by this command"):
        write_pages(project, tmp_path / "t.html")
    assert (tmp_path / "t" / f"{name}.html").read_text() == "mine"


def test_a_file_in_place_of_the_folder_is_refused(project: Path, tmp_path: Path) -> None:
    (tmp_path / "t").write_text("mine")
    with pytest.raises(UserError, match="the folder of the pages, is a file"):
        write_pages(project, tmp_path / "t.html")
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_the_links_of_an_odd_name(project: Path, tmp_path: Path) -> None:
    pages = write_pages(project, tmp_path / "a#b %41.html", max_patients=1)
    assert sum('href="../a%23b%20%2541.html"' in text for text in pages.values()) == 1


def test_the_same_inputs_give_the_same_bytes(project: Path, output: Path, tmp_path: Path) -> None:
    again = write_pages(project, tmp_path / "pages.html")
    assert again == {
        path.name: path.read_text() for path in (output, *output.with_suffix("").glob("*.html"))
    }


@pytest.mark.parametrize("foreign", ["t.html", "t/IP_2000001.html"])
def test_a_foreign_file_is_not_replaced(project: Path, tmp_path: Path, foreign: str) -> None:
    table = pl.read_csv(project / "data" / "test-metadata.csv", infer_schema=False)
    name = next(name for name in table[schema.PATIENT] if name != NASTY)
    file = tmp_path / foreign.replace("IP_2000001", name)
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    with pytest.raises(UserError, match="was not written by this command"):
        write_pages(project, tmp_path / "t.html")
    assert file.read_text() == "mine"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


def test_bad_input_is_refused_in_a_sentence(project: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no test row is of patient nobody"):
        write_pages(project, tmp_path / "t.html", patient="nobody")
    with pytest.raises(UserError, match=r"names an HTML file such as triage\.html"):
        write_pages(project, tmp_path / "folder")
    with pytest.raises(UserError, match="uses images; give --embeddings"):
        write_pages(project, tmp_path / "t.html", embeddings=())
    assert not list(tmp_path.iterdir())


def test_the_command(project: Path, tmp_path: Path, cli: Cli) -> None:
    arguments = (
        *("--data", project / "data", "--ensemble", project / "fitted"),
        *("--embeddings", project / "embeddings" / "tiny", "--out", tmp_path / "t.html"),
        *("--max_patients", 1),
    )
    result = cli("infer", "triage", *arguments)
    assert result.code == 0, result.err
    assert "1 of 6 patients have a page" in result.out


def test_marks_keep_apart() -> None:
    points = np.array([[50.0, 50.0]] * 15)
    moved = keep_apart(points, 14, 200, 200)
    distance = np.linalg.norm(moved[:, None] - moved[None], axis=2)[~np.eye(15, dtype=bool)]
    assert distance.min() > 13
    assert moved.min() >= 7
    assert moved.max() <= 193
    apart = np.array([[20.0, 20.0], [90.0, 90.0]])
    np.testing.assert_allclose(keep_apart(apart, 14, 200, 200), apart, atol=0.01)
    assert keep_apart(np.empty((0, 2)), 14, 200, 200).shape == (0, 2)


def test_outliers_are_those_far_from_their_neighbours() -> None:
    features = np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32)
    features[7] += 30
    assert find_outliers(features)[0] == 7
    assert find_outliers(features[:0]) == []
    assert find_outliers(np.zeros((5, 8), np.float32)) == []
