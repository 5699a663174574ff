"""The report as a whole: its command, its sections and how it looks in a browser."""

import json
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from infer.ensemble.fit import fit_ensemble
from infer.report.cases import NUM_CASES
from infer.report.write import write_report
from isic.runtime.errors import UserError
from tests.support.browser import WIDTHS, inspect
from tests.support.commands import Cli
from tests.support.ensembles import fit_settings, write_dataset, write_embeddings


def copied(root: Path, to: Path) -> Path:
    return Path(shutil.copytree(root, to))


def test_nothing_in_the_data_becomes_markup(page: str, with_images: Path) -> None:
    for text in (page, with_images.read_text()):
        for markup in ("<script", "<img src=x", "<i>", "<b>&quot;"):
            assert markup not in text
        assert "&lt;script&gt;alert(1)&lt;/script&gt;&quot;" in text
    assert "<h1>a &lt;i&gt;&amp;amp;</h1>" in page


@pytest.mark.browser
@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_sound_in_a_browser(
    browser: Browser, fitted: Path, data: Path, with_images: Path, width: int
) -> None:
    found = inspect(browser, with_images, width)
    found.assert_sound()
    text = with_images.read_text()
    assert found.num_images == text.count('src="data:image/jpeg;base64,') > NUM_CASES
    assert ">no image for this id</div>" in text
    assert ">truncated JPEG</div>" in text
    without = write_report(fitted, data)
    tables_only = inspect(browser, without, width, "dark")
    tables_only.assert_sound()
    assert tables_only.num_images == 0
    assert "This dataset has no images." in without.read_text()


@pytest.mark.browser
def test_real_lesions_in_a_browser(browser: Browser, real_data: Path, tmp_path: Path) -> None:
    data = real_data / "real-pairs"
    root = fit_ensemble(fit_settings(data, tmp_path, features="numeric", num_rounds=10))
    found = inspect(browser, write_report(root, data), 390)
    found.assert_sound()
    assert found.num_images >= 2 * NUM_CASES


def test_the_same_inputs_give_the_same_bytes(
    with_images: Path, embeddings: Path, data: Path
) -> None:
    before = with_images.read_bytes()
    write_report(with_images.parent, data.parent / "with_images", [embeddings])
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


def test_the_command(data: Path, fitted: Path, embeddings: Path, tmp_path: Path, cli: Cli) -> None:
    root = copied(fitted, tmp_path / "copy")
    ended = cli("infer", "report", "--ensemble", root, "--data", data)
    assert ended.out == f"report: {root / 'report.html'}\n"
    assert "Not drawn" in (root / "report.html").read_text()
    ended = cli("infer", "report", "--ensemble", root, "--data", data, "--embeddings", embeddings)
    assert "<h3>Fold 2</h3>" in (root / "report.html").read_text()
    ended = cli("infer", "report", "--ensemble", data, "--data", data)
    assert ended.code == 2
    assert "no finished ensemble" in ended.err
    other = write_dataset(tmp_path / "other", num_train=100, num_positives=20)
    ended = cli("infer", "report", "--ensemble", root, "--data", other)
    assert ended.code == 2
    assert "lacks 300 of the scored rows" in ended.err
    strange = write_embeddings(tmp_path / "strange", other)
    ended = cli("infer", "report", "--ensemble", root, "--data", data, "--embeddings", strange)
    assert ended.code == 2
    assert "holds embeddings of strange, but the ensemble was fitted with tiny" in ended.err
    renamed = write_embeddings(tmp_path / "tiny", other)
    ended = cli("infer", "report", "--ensemble", root, "--data", data, "--embeddings", renamed)
    assert ended.code == 2
    assert "fold plan" in ended.err


def test_a_map_of_other_weights_is_refused(
    data: Path, fitted: Path, embeddings: Path, tmp_path: Path
) -> None:
    """They have the ensemble's fold plan and name, as after training and embedding again."""
    cases: dict[str, dict[str, object]] = {
        "other trained weights": {"checkpoints": {"0": "x", "1": "b", "2": "c"}},
        r"another --tta \(flips, not none\)": {"tta": "flips"},
        "another preprocessing": {"preprocess": {"size": 9}},
    }
    ensemble = copied(fitted, tmp_path / "copy")
    for message, changed in cases.items():
        root = copied(embeddings, tmp_path / next(iter(changed)) / "tiny")
        run = root / "train" / "run.json"
        run.write_text(json.dumps(json.loads(run.read_text()) | changed))
        with pytest.raises(UserError, match=f"were made with {message}"):
            write_report(ensemble, data, [root])


def test_a_folder_without_an_ensemble_is_refused(tmp_path: Path, data: Path) -> None:
    with pytest.raises(UserError, match="no finished ensemble"):
        write_report(tmp_path, data)


def test_occlusion_maps_are_below_the_photos(
    exported: Path, embedded: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    chosen = {"features": "image", "embeddings": embedded}
    root = fit_ensemble(fit_settings(synth_dataset, tmp_path, **chosen))
    flags = ["report", "--ensemble", root, "--data", synth_dataset]
    assert cli("infer", *flags).code == 0
    plain = (root / "report.html").read_text()
    assert "occlusion map" not in plain
    ended = cli("infer", *flags, "--maps", exported)
    assert ended.code == 0, ended.err
    page = (root / "report.html").read_text()
    num_photos = page.count('class="photos"')
    assert num_photos > NUM_CASES
    assert page.count('alt="occlusion map of lesion') == page.count("largest change ") == num_photos
    assert len(page) - len(plain) < num_photos * 15_000
    assert "the change of the logit of tiny" in page


def test_maps_of_another_network_are_refused(
    exported: Path, embedded: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    chosen = {"features": "image", "embeddings": embedded}
    root = fit_ensemble(fit_settings(synth_dataset, tmp_path, **chosen))
    raw = fit_ensemble(fit_settings(synth_dataset, tmp_path, features="numeric", num_rounds=2))
    for name, key, value in (("huge", "name", "huge"), ("tiny", "made_from", {"sha256": "other"})):
        copy = copied(exported, tmp_path / f"copy_as_{name}")
        for path in copy.glob("fold_*/model.onnx.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
            path.with_name("best_model.pth.json").unlink()
    cases = {
        "uses no network's score; leave out --maps": (raw, exported),
        "is the network huge, but": (root, tmp_path / "copy_as_huge"),
        "has other trained weights than those": (root, tmp_path / "copy_as_tiny"),
        "has no fold_<k> with an exported model": (root, tmp_path / "tiny"),
    }
    for message, (ensemble, maps) in cases.items():
        flags = ["--ensemble", ensemble, "--data", synth_dataset, "--maps", maps]
        ended = cli("infer", "report", *flags)
        assert ended.code == 2, message
        assert message in ended.err


@pytest.mark.browser
@pytest.mark.parametrize("width", WIDTHS)
def test_occlusion_maps_in_a_browser(
    browser: Browser,
    exported: Path,
    embedded: Path,
    synth_dataset: Path,
    tmp_path: Path,
    width: int,
) -> None:
    chosen = {"features": "image", "embeddings": embedded}
    root = fit_ensemble(fit_settings(synth_dataset, tmp_path, **chosen))
    inspect(browser, write_report(root, synth_dataset, maps=exported), width).assert_sound()
