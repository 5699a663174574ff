"""Embedding runs from end to end: their output, interruptions and refusals."""

import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import polars as pl
import pytest
from tqdm import tqdm

from infer.embedding.store import read_run, scan_embeddings
from infer.engines import load as load_engine
from infer.engines import unavailable_reason
from infer.engines.null import NULL_FILE
from isic.dataset import SPLITS, Dataset
from isic.folds import Folds, read_folds
from isic.images import decode_pool
from isic.metadata import read_metadata
from isic.preprocess import PreprocessSpec
from isic.provenance import read_seen, seen_rows, write_seen
from isic.runtime.files import write_json
from tests.support.commands import ROOT, Cli
from tests.support.datasets import jpeg, small_disk
from tests.support.fake_run import (
    FakeRun,
    embed_flags,
    embed_small_shards,
    grey,
    make_fake_run,
    shard_bytes,
)


def test_each_train_image_once_by_the_fold_that_held_it_out_and_each_test_image_by_all(
    embedded: Path, synth_dataset: Path
) -> None:
    dataset = Dataset(synth_dataset)
    train = scan_embeddings(embedded, "train").collect()
    test = scan_embeddings(embedded, "test").collect()
    table = dataset.metadata("train")
    assert sorted(train["isic_id"]) == sorted(table["isic_id"])
    assert (read_folds(embedded / "folds.parquet").of(train) == train["fold"]).all()
    assert sorted(test["isic_id"]) == sorted([*dataset.metadata("test")["isic_id"]] * 3)
    assert train.schema["features"] == pl.Array(pl.Float16, 64)
    assert train.schema["logit"] == pl.Float32
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
    store = Dataset(synth_dataset).images("train")
    with decode_pool(1) as pool:
        store.decode(rows["isic_id"].to_list(), PreprocessSpec(size=32), images, pool)
    features, _ = engine.run(images)
    np.testing.assert_allclose(rows["features"], features.astype(np.float16), atol=2e-3)


def test_a_second_run_does_nothing_and_another_setting_is_refused(
    exported: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = embed_flags(exported, synth_dataset, tmp_path, "--split", "train")
    first = cli("infer", *flags)
    assert first.code == 0
    assert first.out.strip().splitlines()[-1].startswith("embedded config=tiny split=train images=")
    again = cli("infer", *flags)
    assert again.code == 0
    assert "\nup to date" in again.out
    other = cli("infer", *flags, "--dtype", "float32")
    assert other.code == 2
    assert "made with dtype = float16, now it is float32" in other.err
    forced = cli("infer", *flags, "--dtype", "float32", "--force")
    assert forced.code == 0
    columns = scan_embeddings(tmp_path / "tiny", "train").collect_schema()
    assert columns["features"] == pl.Array(pl.Float32, 64)


def test_folds_all_gives_every_image_by_every_fold(
    exported: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = embed_flags(exported, synth_dataset, tmp_path, "--split", "train", "--folds", "all")
    assert cli("infer", *flags).code == 0
    counts = scan_embeddings(tmp_path / "tiny", "train").group_by("isic_id").len().collect()["len"]
    assert (counts == 3).all()


def test_batch_size_and_threads_do_not_change_the_values(
    exported: Path, synth_dataset: Path, embedded: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = embed_flags(exported, synth_dataset, tmp_path, "--batch_size", 5, "--num_threads", 3)
    assert cli("infer", *flags).code == 0
    for split in SPLITS:
        expected = scan_embeddings(embedded, split).collect()
        assert scan_embeddings(tmp_path / "tiny", split).collect().equals(expected)


@pytest.fixture
def broken_dataset(synth_dataset: Path, tmp_path: Path) -> Path:
    """The synthetic test split with a missing image, three broken ones, and one too many."""
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


def test_bad_images_are_skipped_and_listed(
    exported: Path, broken_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    ended = cli(
        "infer",
        *embed_flags(exported, broken_dataset, tmp_path, "--split", "test", "--max_bad", 0.5),
    )
    assert ended.code == 0
    assert "bad=4" in ended.out
    errors = dict(pl.read_parquet(tmp_path / "tiny" / "test" / "errors.parquet").iter_rows())
    assert list(errors.values())[:2] == ["no image for this id", "truncated JPEG"]
    assert len(errors) == 4
    ids = read_metadata(broken_dataset / "test-metadata.csv")["isic_id"]
    kept = scan_embeddings(tmp_path / "tiny", "test").collect()["isic_id"].unique()
    assert set(kept) == set(ids) - set(errors)


def test_bad_images_stop_a_run_beyond_the_limit(
    exported: Path, broken_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    ended = cli(
        "infer",
        *embed_flags(exported, broken_dataset, tmp_path, "--split", "test", "--on_error", "raise"),
    )
    assert ended.code == 2
    assert "no image for this id" in ended.err
    ended = cli("infer", *embed_flags(exported, broken_dataset, tmp_path, "--split", "test"))
    assert ended.code == 2
    assert "4 of the first" in ended.err
    assert "--max_bad" in ended.err


def test_a_missing_gpu_is_reported_with_the_cause(
    exported: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    if unavailable_reason("onnx", "cuda") is None:
        pytest.skip("this machine has a GPU")
    ended = cli("infer", *embed_flags(exported, synth_dataset, tmp_path, "--device", "cuda"))
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert "doctor" not in ended.err
    assert "does not run on --device cuda here: " in ended.err
    assert "--device cpu" in ended.err


@pytest.mark.parametrize("visible", ["-1", "", "0,-1,1", "0"])
def test_a_hidden_or_missing_gpu_leaves_the_cpu_and_its_batch_size(
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
    ended = cli("infer", *embed_flags(exported, synth_dataset, tmp_path, "--split", "test"))
    assert ended.code == 0
    assert ended.err == ""
    run = json.loads((tmp_path / "tiny" / "test" / "run.json").read_text())
    assert (run["device"], run["batch_size"]) == ("cpu", 64)


def test_int8_that_was_checked_on_another_architecture_gives_a_warning(
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
        flags = ("--split", "test", "--format", "model.onnx")
        ended = cli("infer", *embed_flags(run, synth_dataset, tmp_path / "out", *flags))
        assert ended.code == 0
        assert ended.err.count("\n") == num_warnings
        assert ended.err.count("in int8 was checked on sparc64, this is ") == num_warnings


WITHOUT_TORCH = """
import runpy
import sys

sys.argv = ["infer", *sys.argv[1:]]
runpy.run_module("infer", run_name="__main__")
assert not {"torch", "timm", "ray", "train", "export"} & set(sys.modules)
"""


def test_inference_imports_no_torch(exported: Path, synth_dataset: Path, tmp_path: Path) -> None:
    flags = embed_flags(exported, synth_dataset, tmp_path, "--split", "test")
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, flags)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "tiny" / "test" / "run.json").read_text())["num_bad"] == 0


def test_the_challenges_own_test_images(
    real_data: Path, exported: Path, tmp_path: Path, cli: Cli
) -> None:
    """Models of one dataset may embed the test split of another."""
    flags = embed_flags(exported, real_data / "real-pairs", tmp_path, "--split", "test")
    assert cli("infer", *flags).code == 0
    rows = scan_embeddings(tmp_path / "tiny", "test").collect()
    assert rows["isic_id"].n_unique() == 3
    assert len(rows) == 9
    assert rows["logit"].is_finite().all()


def test_every_image_once_with_its_own_values(whole: Path, fake_run: FakeRun) -> None:
    rows = scan_embeddings(whole, "train").collect().sort("isic_id")
    assert rows["isic_id"].to_list() == [f"ISIC_{row:07d}" for row in range(300)]
    features = rows["features"].to_numpy()[:, 0]
    np.testing.assert_array_equal(features, [grey(row) for row in range(300)])
    assert (read_folds(whole / "folds.parquet").of(rows) == rows["fold"]).all()
    # The null engine of a fold adds the fold's number.
    np.testing.assert_allclose(rows["logit"] - rows["fold"], features, atol=1e-3)


def test_a_run_records_its_counts_and_the_time_per_stage(whole: Path) -> None:
    run = read_run(whole, "train")
    assert (run["num_images"], run["num_bad"], run["embedded_now"]) == (300, 0, 300)
    assert run["batch_size"] == 8
    assert set(run["seconds"]) == {"total", "decode_wait", "engine", "write_wait"}
    assert sum(run["wait_shares"].values()) == pytest.approx(1)
    assert run["bound_by"] in {"decode", "engine", "write"}
    assert run["images_per_second"] > 0
    assert run["peak_memory_mb"] is None or 20 < run["peak_memory_mb"] < 1500
    assert {"numpy", "polars", "opencv-python-headless"} <= set(run["versions"])


def test_the_last_line_is_for_scripts_and_a_pipe_gets_no_bar(
    fake_run: FakeRun, tmp_path: Path
) -> None:
    ended = fake_run.run(tmp_path)
    kind, *fields = ended.stdout.splitlines()[-1].split()
    values = dict(field.split("=", 1) for field in fields)
    assert kind == "embedded"
    assert ended.stderr == ""
    assert (values["config"], values["split"]) == ("null", "train")
    assert (values["images"], values["bad"]) == ("300", "0")
    assert float(values["images_per_second"]) > 0
    assert Path(values["output"]) == tmp_path / "null" / "train"


@pytest.mark.slow
def test_killed_at_twenty_random_moments_it_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real processes get SIGKILL, at moments from their start to well into embedding."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system has no forkserver")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.fake_run"])
    # Before Python 3.13 the fork server does not get sys.path.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    slow = make_fake_run(tmp_path / "slow", images_per_second=100)
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"

    def start(output: Path) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=embed_small_shards, args=(slow, output))
        process.start()
        return process

    def seconds_of(process: multiprocessing.process.BaseProcess) -> float:
        started = time.perf_counter()
        process.join()
        assert process.exitcode == 0
        return time.perf_counter() - started

    seconds_of(start(whole))
    expected = shard_bytes(whole)
    start_up = seconds_of(start(whole))  # this run has nothing to embed
    moments = random.Random(5)
    num_killed = 0
    num_done = set()
    while num_killed < 20:
        process = start(killed)
        process.join(moments.uniform(0, start_up + 0.5))
        process.kill()
        process.join()
        num_killed += process.exitcode == -signal.SIGKILL
        found = shard_bytes(killed)
        num_done.add(len(found))
        assert all(expected[name] == data for name, data in found.items()), "a broken shard"
        if process.exitcode == 0:  # it finished before it was killed
            shutil.rmtree(killed)
    assert len(num_done) > 2, "the moments were not spread over the work"
    seconds_of(start(killed))
    assert shard_bytes(killed) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "num_processes"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 2)]
)
def test_a_signal_ends_a_run_cleanly_and_it_can_be_resumed(
    tmp_path: Path, number: signal.Signals, num_processes: int
) -> None:
    slow = make_fake_run(tmp_path / "slow", images_per_second=60)
    command = slow.command(tmp_path, "--num_processes", num_processes)
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not shard_bytes(tmp_path) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors == f"stopped by {number.name}; the same command resumes the run\n"
    num_done = len(shard_bytes(tmp_path))
    assert 0 < num_done < 15
    assert not list(tmp_path.rglob(".*.tmp"))
    assert slow.run(tmp_path).returncode == 0
    assert len(shard_bytes(tmp_path)) == 16


@pytest.mark.slow
def test_a_full_disk_is_a_user_error_and_a_rerun_completes(tmp_path: Path) -> None:
    """Files on a tmpfs take whole pages of 4 KB: 15 shards do not fit in ten pages."""
    wide = make_fake_run(tmp_path / "wide", num_features=256)
    assert wide.run(tmp_path / "whole").returncode == 0
    disk = tmp_path / "disk"
    with small_disk(disk, "40k"):
        ended = wide.run(disk)
        assert ended.returncode == 2
        assert ended.stderr.startswith("error: the disk is full, so ")
        assert ended.stderr.count("\n") == 1
        written = shard_bytes(disk)
        expected = shard_bytes(tmp_path / "whole")
        assert 0 < len(written) < len(expected)
        assert all(expected[name] == data for name, data in written.items()), "a broken shard"
        assert not list(disk.rglob(".*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        ended = wide.run(disk)
        assert ended.returncode == 0, ended.stderr
        assert shard_bytes(disk) == expected


def test_bad_images_of_all_shards_count_towards_the_limit(
    fake_run: FakeRun, tmp_path: Path, cli: Cli
) -> None:
    data = shutil.copytree(fake_run.data, tmp_path / "data")
    with h5py.File(data / "train-image.hdf5", "a") as file:
        for row in (3, 4, 5):
            del file[f"ISIC_{row:07d}"]
        file["ISIC_0000004"] = np.bytes_(jpeg(40)[:200])
        file["ISIC_0000005"] = np.bytes_(b"text")
    damaged = FakeRun(data, fake_run.model_dir)
    allowed = cli("infer", *damaged.flags(tmp_path / "out"))
    assert allowed.code == 0
    assert "images=297 bad=3" in allowed.out
    errors = pl.read_parquet(tmp_path / "out/null/train/errors.parquet").sort("isic_id")
    assert errors["reason"].to_list() == ["no image for this id", "truncated JPEG", "not an image"]
    stopped = cli("infer", *damaged.flags(tmp_path / "strict", "--max_bad", 0.005))
    assert stopped.code == 2
    assert "images cannot be used (" in stopped.err
    assert "--max_bad" in stopped.err
    again = cli("infer", *damaged.flags(tmp_path / "out", "--on_error", "raise"))
    assert again.code == 2
    assert "; fix it, or skip such images" in again.err


def test_models_of_another_fold_plan_are_refused(
    fake_run: FakeRun, tmp_path: Path, cli: Cli
) -> None:
    model_dir = shutil.copytree(fake_run.model_dir, tmp_path / "null")
    folds = read_folds(model_dir / "folds.parquet")
    shifted = folds.table.with_columns((pl.col("fold") + 1) % 3)
    Folds(shifted).write(model_dir / "folds.parquet")
    ended = cli("infer", *FakeRun(fake_run.data, model_dir).flags(tmp_path / "out"))
    assert ended.code == 2
    assert "was trained with the fold plan" in ended.err


def test_a_fold_without_an_artifact_is_noted(fake_run: FakeRun, tmp_path: Path, cli: Cli) -> None:
    model_dir = Path(shutil.copytree(fake_run.model_dir, tmp_path / "null"))
    (model_dir / "fold_1" / NULL_FILE).unlink()
    ended = cli("infer", *FakeRun(fake_run.data, model_dir).flags(tmp_path / "out"))
    assert ended.code == 0
    assert "note: fold_1 in" in ended.out
    assert "are not embedded" in ended.out


def test_the_lists_of_training_images_are_copied(
    fake_run: FakeRun, tmp_path: Path, cli: Cli
) -> None:
    model_dir = Path(shutil.copytree(fake_run.model_dir, tmp_path / "null"))
    for fold, name in enumerate("abc"):
        seen = seen_rows(pl.DataFrame({"isic_id": [name, "x"]}))
        write_seen(model_dir / f"fold_{fold}" / "trained_on.parquet", seen)
    flags = FakeRun(fake_run.data, model_dir).flags
    assert cli("infer", *flags(tmp_path / "out")).code == 0
    root = tmp_path / "out" / "null" / "train"
    for fold, name in enumerate("abc"):
        seen = read_seen(root / f"fold_{fold}" / "trained_on.parquet")
        assert seen["isic_id"].to_list() == [name, "x"]

    manifest = model_dir / "fold_1" / f"{NULL_FILE}.json"
    write_json(manifest, json.loads(manifest.read_text()) | {"trained_on": "0" * 64})
    ended = cli("infer", *flags(tmp_path / "again"))
    assert ended.code == 2
    assert "is not the list of images that the exported model was trained on" in ended.err


def test_no_thread_is_left_behind(fake_run: FakeRun, tmp_path: Path, cli: Cli) -> None:
    before = set(threading.enumerate())
    assert cli("infer", *fake_run.flags(tmp_path)).code == 0
    # tqdm starts one thread per process, which stays.
    assert not set(threading.enumerate()) - before - {tqdm.monitor}


def test_embeddings_are_not_written_into_a_dataset(
    fake_run: FakeRun, tmp_path: Path, cli: Cli
) -> None:
    shutil.copytree(fake_run.data, tmp_path / "null")
    ended = cli("infer", *fake_run.flags(tmp_path))
    assert ended.code == 2
    assert "holds a dataset" in ended.err
    assert not (tmp_path / "null" / "folds.parquet").exists()
