import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import polars as pl
import pytest

from infer.embedding.store import read_run, scan_embeddings
from infer.engines import load as load_engine
from infer.engines import unavailable_reason
from isic.dataset import Dataset
from isic.folds import read_folds
from isic.images import decode_pool
from isic.metadata import read_metadata
from tests.support.commands import ROOT, Cli
from tests.support.datasets import jpeg


def flags(exported: Path, data: Path, output: Path, *more: object) -> list[object]:
    where = ["--model_dir", exported, "--data", data, "--output_dir", output]
    return ["embed", "--model_config", "tiny", *where, *more]


def test_each_train_image_once_by_the_fold_that_held_it_out_and_each_test_image_by_all(
    embedded: Path, synth_dataset: Path
) -> None:
    dataset = Dataset(synth_dataset)
    train, test = (
        scan_embeddings(embedded, "train").collect(),
        scan_embeddings(embedded, "test").collect(),
    )
    table = dataset.metadata("train")
    assert sorted(train["isic_id"]) == sorted(table["isic_id"])
    assert (read_folds(embedded / "folds.parquet").of(train) == train["fold"]).all()
    assert sorted(test["isic_id"]) == sorted([*dataset.metadata("test")["isic_id"]] * 3)
    assert (
        train.schema["features"] == pl.Array(pl.Float16, 64) and train.schema["logit"] == pl.Float32
    )
    run = read_run(embedded, "train")
    assert (run["num_images"], run["num_bad"], run["folds"]) == (len(table), 0, [0, 1, 2])


def test_the_logits_are_those_of_training(embedded: Path, trained: Path) -> None:
    oof = pl.concat([pl.read_parquet(trained / f"fold_{k}" / "oof.parquet") for k in range(3)])
    both = oof.join(scan_embeddings(embedded, "train").collect(), on="isic_id", suffix="_engine")
    assert len(both) == len(oof)
    np.testing.assert_allclose(both["logit"], both["logit_engine"], atol=1e-4)


def test_features_are_the_engines(embedded: Path, exported: Path, synth_dataset: Path) -> None:
    rows = scan_embeddings(embedded, "train").collect().filter(pl.col("fold") == 2).head(5)
    engine = load_engine(exported / "fold_2" / "model.onnx", "cpu")
    images = np.empty((5, 32, 32, 3), np.uint8)
    from isic.preprocess import PreprocessSpec

    with decode_pool(1) as pool:
        Dataset(synth_dataset).images("train").decode(
            rows["isic_id"].to_list(), PreprocessSpec(size=32), images, pool
        )
    np.testing.assert_allclose(
        rows["features"].to_numpy(), engine.run(images)[0].astype(np.float16), atol=2e-3
    )


def test_a_second_run_does_nothing_and_another_setting_is_refused(
    exported: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    first = cli("infer", *flags(exported, synth_dataset, tmp_path, "--split", "train"))
    assert first.code == 0 and first.out.strip().splitlines()[-1].startswith(
        "embedded config=tiny split=train images="
    )
    again = cli("infer", *flags(exported, synth_dataset, tmp_path, "--split", "train"))
    assert again.code == 0 and again.out.startswith("up to date")
    other = cli(
        "infer", *flags(exported, synth_dataset, tmp_path, "--split", "train", "--dtype", "float32")
    )
    assert other.code == 2 and "made with dtype = float16, now it is float32" in other.err
    forced = cli(
        "infer",
        *flags(
            exported, synth_dataset, tmp_path, "--split", "train", "--dtype", "float32", "--force"
        ),
    )
    assert forced.code == 0
    assert scan_embeddings(tmp_path / "tiny", "train").collect_schema()["features"] == pl.Array(
        pl.Float32, 64
    )


def test_folds_all_gives_every_image_by_every_fold(
    exported: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    assert (
        cli(
            "infer", *flags(exported, synth_dataset, tmp_path, "--split", "train", "--folds", "all")
        ).code
        == 0
    )
    counts = scan_embeddings(tmp_path / "tiny", "train").group_by("isic_id").len().collect()["len"]
    assert (counts == 3).all()


def test_batch_size_and_threads_do_not_change_what_is_said(
    exported: Path, synth_dataset: Path, embedded: Path, tmp_path: Path, cli: Cli
) -> None:
    assert (
        cli(
            "infer",
            *flags(exported, synth_dataset, tmp_path, "--batch_size", 5, "--num_threads", 3),
        ).code
        == 0
    )
    for split in ("train", "test"):
        one, other = (
            scan_embeddings(root, split).collect() for root in (embedded, tmp_path / "tiny")
        )  # type: ignore[arg-type]
        assert one.equals(other)


@pytest.fixture
def broken_dataset(synth_dataset: Path, tmp_path: Path) -> Path:
    """The synthetic test split with one image gone, one cut short, one empty, one that is text, and one too many."""
    folder = shutil.copytree(synth_dataset, tmp_path / "broken")
    ids = read_metadata(folder / "test-metadata.csv")["isic_id"].to_list()
    with h5py.File(folder / "test-image.hdf5", "a") as file:
        for name in ids[:4]:
            del file[name]
        file[ids[1]] = np.bytes_(jpeg()[:400])
        file[ids[2]] = np.bytes_(b"\0")
        file[ids[3]] = np.bytes_(b"this is text")
        file["ISIC_not_in_the_table"] = np.bytes_(jpeg())
    return folder


def test_bad_images_are_listed_and_never_end_a_run(
    exported: Path, broken_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    ended = cli(
        "infer", *flags(exported, broken_dataset, tmp_path, "--split", "test", "--max_bad", 0.5)
    )
    assert ended.code == 0 and "bad=4" in ended.out
    errors = dict(pl.read_parquet(tmp_path / "tiny" / "test" / "errors.parquet").iter_rows())
    assert (
        list(errors.values())[:2] == ["no image for this id", "truncated JPEG"] and len(errors) == 4
    )
    ids = read_metadata(broken_dataset / "test-metadata.csv")["isic_id"]
    kept = scan_embeddings(tmp_path / "tiny", "test").collect()["isic_id"].unique()
    assert set(kept) == set(ids) - set(errors)


def test_bad_images_stop_the_run_where_they_should(
    exported: Path, broken_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    ended = cli(
        "infer",
        *flags(exported, broken_dataset, tmp_path, "--split", "test", "--on_error", "raise"),
    )
    assert ended.code == 2 and "no image for this id" in ended.err
    ended = cli("infer", *flags(exported, broken_dataset, tmp_path, "--split", "test"))
    assert ended.code == 2 and "4 of the first" in ended.err and "--max_bad" in ended.err


def test_engines_that_do_not_belong_are_refused(
    exported: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    run = shutil.copytree(exported, tmp_path / "tiny")
    arguments = flags(run, synth_dataset, tmp_path / "out")

    def fails_with(words: str) -> None:
        ended = cli("infer", *arguments)
        assert ended.code == 2 and words in ended.err and ended.err.count("\n") == 1

    for suffix in ("", ".json"):
        shutil.copy(run / "fold_1" / f"model.onnx{suffix}", run / "fold_0" / f"model.onnx{suffix}")
        fails_with("does not match its manifest" if not suffix else "is fold 1 of tiny, not fold 0")
    (run / "fold_0" / "model.onnx").write_bytes(b"truncated")
    fails_with("does not match its manifest")
    (run / "fold_0" / "model.onnx.json").unlink()
    fails_with("model.onnx.json is missing")
    (run / "fold_0" / "model.onnx").unlink()
    (run / "folds.parquet").unlink()
    fails_with("no fold plan")
    for fold in (1, 2):
        (run / f"fold_{fold}" / "model.onnx").unlink()
    fails_with("run `python -m export --config tiny` first")


def test_two_folds_that_traded_their_engines_are_found_out(
    exported: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    run = shutil.copytree(exported, tmp_path / "tiny")
    for suffix, words in (
        ("", "does not match its manifest"),
        (".json", "is fold 1 of tiny, not fold 0 of tiny"),
    ):
        first, second = (run / f"fold_{fold}" / f"model.onnx{suffix}" for fold in (0, 1))
        first.rename(tmp_path / "traded")
        second.rename(first)
        (tmp_path / "traded").rename(second)
        ended = cli("infer", *flags(run, synth_dataset, tmp_path / "out"))
        assert ended.code == 2 and words in ended.err


def test_a_gpu_that_is_not_there_is_refused_with_the_cause(
    exported: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    if unavailable_reason("onnx", "cuda") is None:
        pytest.skip("this machine has a GPU")
    ended = cli("infer", *flags(exported, synth_dataset, tmp_path, "--device", "cuda"))
    assert ended.code == 2 and ended.err.count("\n") == 1 and "doctor" not in ended.err
    assert "does not run on --device cuda here: " in ended.err and "--device cpu" in ended.err


@pytest.mark.parametrize("visible", ["-1", "", "0,-1,1", "0"])
def test_a_gpu_that_is_hidden_or_absent_leaves_the_cpu_and_its_batches(
    visible: str,
    exported: Path,
    synth_dataset: Path,
    tmp_path: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if unavailable_reason("onnx", "cuda") is None:
        pytest.skip("this machine has a GPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    ended = cli("infer", *flags(exported, synth_dataset, tmp_path, "--split", "test"))
    assert ended.code == 0 and ended.err == ""
    run = json.loads((tmp_path / "tiny" / "test" / "run.json").read_text())
    assert (run["device"], run["batch_size"]) == ("cpu", 64)


def test_int8_that_was_checked_on_another_kind_of_cpu_is_warned_of(
    exported: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    run = shutil.copytree(exported, tmp_path / "tiny")
    for architecture, precision, num_warnings in (
        (platform.machine(), "int8", 0),
        ("sparc64", "fp32", 0),
        ("sparc64", "int8", 3),
    ):
        for path in run.glob("fold_*/model.onnx.json"):
            manifest = json.loads(path.read_text())
            manifest["parity"]["cpu"]["architecture"] = architecture
            path.write_text(json.dumps({**manifest, "precision": precision}))
        ended = cli("infer", *flags(run, synth_dataset, tmp_path / "out", "--split", "test"))
        assert ended.code == 0 and ended.err.count("\n") == num_warnings
        assert ended.err.count("in int8 was checked on sparc64, this is ") == num_warnings


def test_inference_imports_no_torch(exported: Path, synth_dataset: Path, tmp_path: Path) -> None:
    code = (
        "import sys, runpy; sys.argv = ['infer', *sys.argv[1:]]; runpy.run_module('infer', run_name='__main__')\n"
        "assert not {'torch', 'timm', 'ray', 'train', 'export'} & set(sys.modules)"
    )
    command = [
        sys.executable,
        "-c",
        code,
        *map(str, flags(exported, synth_dataset, tmp_path, "--split", "test")),
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "tiny" / "test" / "run.json").read_text())["num_bad"] == 0


def test_the_challenges_own_test_images(
    real_data: Path, exported: Path, tmp_path: Path, cli: Cli
) -> None:
    """Engines of one dataset may embed the test split of another: no fold has seen it."""
    assert (
        cli("infer", *flags(exported, real_data / "real-pairs", tmp_path, "--split", "test")).code
        == 0
    )
    rows = scan_embeddings(tmp_path / "tiny", "test").collect()
    assert rows["isic_id"].n_unique() == 3 and len(rows) == 9
    assert rows["logit"].is_finite().all()
