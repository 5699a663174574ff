"""What an embedding run must survive, and that every way to run it gives the same bytes."""

import json
import multiprocessing
import os
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

from infer.embedding.store import read_run, scan_embeddings
from infer.engines.null import NULL_FILE, write_run
from isic.folds import read_folds
from isic.preprocess import PreprocessSpec
from isic.provenance import read_seen, seen_rows, write_seen
from isic.runtime.errors import UserError
from isic.runtime.files import write_json
from tests.support.commands import Cli
from tests.support.datasets import jpeg, small_disk, write_hdf5
from tests.support.fake_run import (
    ROOT,
    FakeRun,
    embed_small_shards,
    grey,
    make_fake_run,
    shard_bytes,
)


@pytest.fixture(scope="module")
def fake_run(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    return make_fake_run(tmp_path_factory.mktemp("stand-in"))


@pytest.fixture(scope="module")
def whole(fake_run: FakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run gives that nothing disturbs."""
    output = tmp_path_factory.mktemp("whole")
    ended = fake_run.run(output)
    assert ended.returncode == 0, ended.stderr
    return output / "null"


def test_every_image_once_with_its_own_values(whole: Path, fake_run: FakeRun) -> None:
    rows = scan_embeddings(whole, "train").collect().sort("isic_id")
    assert rows["isic_id"].to_list() == [f"ISIC_{row:07d}" for row in range(300)]
    np.testing.assert_array_equal(
        rows["features"].to_numpy()[:, 0], [grey(row) for row in range(300)]
    )
    assert (read_folds(whole / "folds.parquet").of(rows) == rows["fold"]).all()
    np.testing.assert_allclose(
        rows["logit"] - rows["fold"], rows["features"].to_numpy()[:, 0], atol=1e-3
    )


def test_a_run_says_what_it_did_and_where_the_time_went(whole: Path) -> None:
    run = read_run(whole, "train")
    assert (run["num_images"], run["num_bad"], run["embedded_now"], run["batch_size"]) == (
        300,
        0,
        300,
        8,
    )
    assert set(run["seconds"]) == {"total", "decode_wait", "engine", "write_wait"}
    assert sum(run["wait_shares"].values()) == pytest.approx(1)
    assert run["bound_by"] in {"decode", "engine", "write"} and run["images_per_second"] > 0
    assert run["peak_memory_mb"] is None or 20 < run["peak_memory_mb"] < 1500
    assert {"numpy", "polars", "opencv-python-headless"} <= set(run["versions"])


def test_the_last_line_is_for_scripts_and_a_pipe_sees_no_bar(
    fake_run: FakeRun, tmp_path: Path
) -> None:
    ended = fake_run.run(tmp_path)
    kind, *fields = ended.stdout.splitlines()[-1].split()
    values = dict(field.split("=", 1) for field in fields)
    assert kind == "embedded" and ended.stderr == ""
    assert (values["images"], values["bad"], values["split"], values["config"]) == (
        "300",
        "0",
        "train",
        "null",
    )
    assert (
        float(values["images_per_second"]) > 0
        and Path(values["output"]) == tmp_path / "null" / "train"
    )


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_sees_a_bar_unless_it_wants_quiet(
    fake_run: FakeRun, tmp_path: Path, quiet: bool
) -> None:
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    command = fake_run.command(tmp_path, *(["--quiet"] if quiet else []))
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=theirs)
    assert process.wait(60) == 0
    os.set_blocking(ours, False)
    os.close(theirs)
    try:
        shown = os.read(ours, 1 << 20).decode()
    except OSError:  # nothing was written, and the other end is closed
        shown = ""
    os.close(ours)
    assert ("img/s" in shown and "bound by" in shown) is not quiet


def test_killed_at_twenty_random_moments_it_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real process and a real signal 9, at moments spread from its start to well into embedding."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system has no forkserver")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.fake_run"])
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(sys.path)
    )  # before 3.13 the server does not get it otherwise
    slow = make_fake_run(tmp_path / "slow", images_per_second=100)
    whole, killed = tmp_path / "whole", tmp_path / "killed"

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
    start_up = seconds_of(start(whole))  # it has nothing to do
    moments, num_killed, num_done = random.Random(5), 0, set()
    while num_killed < 20:
        process = start(killed)
        process.join(moments.uniform(0, start_up + 0.5))
        process.kill()
        process.join()
        num_killed += process.exitcode == -signal.SIGKILL
        found = shard_bytes(killed)
        num_done.add(len(found))
        assert all(expected[name] == data for name, data in found.items()), "a broken part"
        if process.exitcode == 0:  # it was quicker than it should be: from the beginning
            shutil.rmtree(killed)
    assert len(num_done) > 2, "the moments were not spread over the work"
    seconds_of(start(killed))
    assert shard_bytes(killed) == expected


@pytest.mark.parametrize(
    ("number", "num_processes"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 2)]
)
def test_a_signal_ends_it_cleanly_and_it_goes_on_from_there(
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
    assert 0 < num_done < 15 and not list(tmp_path.rglob(".*.tmp"))
    assert slow.run(tmp_path).returncode == 0 and len(shard_bytes(tmp_path)) == 16


def test_a_full_disk_is_a_sentence_and_a_rerun_completes(tmp_path: Path) -> None:
    """A file on a tmpfs takes whole pages of 4 KB, and there are 15 shards: ten pages do not hold them."""
    wide = make_fake_run(tmp_path / "wide", num_features=256)
    assert wide.run(tmp_path / "whole").returncode == 0
    disk = tmp_path / "disk"
    with small_disk(disk, "40k"):
        ended = wide.run(disk)
        assert ended.returncode == 2
        assert (
            ended.stderr.startswith("error: the disk is full, so ")
            and ended.stderr.count("\n") == 1
        )
        written = shard_bytes(disk)
        expected = shard_bytes(tmp_path / "whole")
        assert 0 < len(written) < len(expected)
        assert all(expected[name] == data for name, data in written.items()), "a broken part"
        assert not list(disk.rglob(".*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        ended = wide.run(disk)
        assert ended.returncode == 0, ended.stderr
        assert shard_bytes(disk) == expected


def test_several_processes_give_the_same_bytes(
    whole: Path, fake_run: FakeRun, tmp_path: Path
) -> None:
    ended = fake_run.run(tmp_path, "--num_processes", 3)
    assert ended.returncode == 0, ended.stderr
    assert "images=300" in ended.stdout
    assert shard_bytes(tmp_path / "null") == shard_bytes(whole)


def children(pid: int) -> list[int]:
    """Returns the worker processes of a run; Linux only."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [
        int(child)
        for child in found
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the workers through /proc")
def test_the_parts_of_a_lost_worker_are_done_again(tmp_path: Path) -> None:
    slow = make_fake_run(tmp_path / "slow", images_per_second=100)
    assert slow.run(tmp_path / "whole").returncode == 0
    command = slow.command(tmp_path / "lost", "--num_processes", 2)
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not shard_bytes(tmp_path / "lost") and process.poll() is None:
        time.sleep(0.02)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "a worker was lost (exit code -9)" in errors and "images=300" in out
    assert shard_bytes(tmp_path / "lost") == shard_bytes(tmp_path / "whole")


def test_what_a_worker_has_to_say_reaches_the_user(fake_run: FakeRun, tmp_path: Path) -> None:
    data = shutil.copytree(fake_run.data, tmp_path / "data")
    with h5py.File(data / "train-image.hdf5", "a") as file:
        for row in range(30):
            del file[f"ISIC_{row:07d}"]
    ended = FakeRun(data, fake_run.model_dir).run(tmp_path / "out", "--num_processes", 2)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert "cannot be used (" in ended.stderr and "no image for this id" in ended.stderr


def test_workers_that_all_die_end_the_run(fake_run: FakeRun, tmp_path: Path) -> None:
    """They are given cores that do not exist. Nothing is tried for ever."""
    code = (
        "import infer.embedding.workers as w\n"
        "if __name__ == '__main__':\n"
        "    from infer.embedding.embed import embed_dataset; from isic.runtime import cli\n"
        "    w.core_slice = lambda *a: [100_000]\n"
        "    cli.run({'embed': embed_dataset})"
    )
    (tmp_path / "run.py").write_text(code)
    command = [
        sys.executable,
        str(tmp_path / "run.py"),
        *fake_run.flags(tmp_path / "out", "--num_processes", 2),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert ended.returncode == 2 and "every worker was lost before it finished one" in ended.stderr


def test_more_bad_images_than_allowed_stop_a_run_however_it_is_cut_up(
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
    assert allowed.code == 0 and "images=297 bad=3" in allowed.out
    errors = dict(
        pl.read_parquet(tmp_path / "out/null/train/errors.parquet").sort("isic_id").iter_rows()
    )
    assert list(errors.values()) == ["no image for this id", "truncated JPEG", "not an image"]
    stopped = cli("infer", *damaged.flags(tmp_path / "strict", "--max_bad", 0.005))
    assert (
        stopped.code == 2
        and "images cannot be used (" in stopped.err
        and "--max_bad" in stopped.err
    )
    again = cli("infer", *damaged.flags(tmp_path / "out", "--on_error", "raise"))
    assert again.code == 2 and "; fix it, or skip such images" in again.err


def test_test_time_augmentation_sees_every_view(tmp_path: Path) -> None:
    """Features are the first pixels, so the average over the views must be that of the corners' pixels."""
    data = tmp_path / "data" / "train-image"
    data.mkdir(parents=True)
    import cv2

    for row in range(12):
        image = np.random.default_rng(row).integers(0, 256, (16, 16, 3), np.uint8)
        (data / f"ISIC_{row}.jpg").write_bytes(cv2.imencode(".png", image[..., ::-1])[1].tobytes())
    table = pl.DataFrame(
        {"isic_id": [f"ISIC_{row}" for row in range(12)], "target": [row % 2 for row in range(12)]}
    )
    table.write_csv(tmp_path / "data" / "train-metadata.csv")
    write_run(
        tmp_path / "null", tmp_path / "data" / "train-metadata.csv", PreprocessSpec(size=16), 2, 3
    )
    for tta, corners in (("none", 1), ("flips", 4), ("d4", 4)):
        fake_run = FakeRun(tmp_path / "data", tmp_path / "null")
        ended = fake_run.run(tmp_path / tta, "--tta", tta, "--dtype", "float32")
        assert ended.returncode == 0, ended.stderr
        for name, features in (
            scan_embeddings(tmp_path / tta / "null", "train", ["features"])
            .select("isic_id", "features")
            .collect()
            .iter_rows()
        ):
            image = (
                np.random.default_rng(int(name[5:])).integers(0, 256, (16, 16, 3), np.uint8) / 255
            )
            mean = np.mean(
                [image[0, 0], image[0, 15], image[15, 0], image[15, 15]][:corners], axis=0
            )
            np.testing.assert_allclose(features, mean, atol=1e-6)
    assert read_run(tmp_path / "d4" / "null", "train")["tta"] == "d4"


def test_a_part_of_another_run_is_noticed(
    whole: Path, fake_run: FakeRun, tmp_path: Path, cli: Cli
) -> None:
    """It holds the very ids it should, but another plan made it."""
    root, place = shutil.copytree(whole, tmp_path / "null"), Path("train/fold_0/part-00000.parquet")
    flags = fake_run.flags(tmp_path / "other", "--batch_size", 8, "--dtype", "float32")
    assert cli("infer", *flags).code == 0
    shutil.copy(next((tmp_path / "other/null/train/fold_0").glob("part-*.parquet")), root / place)
    with pytest.raises(UserError, match=r"part-00000\.parquet was made by another run"):
        scan_embeddings(root, "train")
    (root / place).write_bytes((whole / place).read_bytes()[:100])
    with pytest.raises(UserError, match=r"part-00000\.parquet is damaged"):
        scan_embeddings(root, "train")
    shutil.copy(whole / place, root / place)
    assert len(scan_embeddings(root, "train").collect()) == 300
    (root / "train" / "run.json").unlink()
    with pytest.raises(UserError, match="has no finished train embeddings"):
        scan_embeddings(root, "train")


def test_the_batch_size_of_a_run_is_kept_when_it_goes_on(
    fake_run: FakeRun, tmp_path: Path, cli: Cli
) -> None:
    """What an engine computes may depend on it in the last bit."""
    assert cli("infer", *fake_run.flags(tmp_path, "--batch_size", 7)).code == 0
    next((tmp_path / "null").rglob("part-*.parquet")).unlink()
    assert cli("infer", *fake_run.flags(tmp_path)).code == 0
    assert read_run(tmp_path / "null", "train")["batch_size"] == 7
    refused = cli("infer", *fake_run.flags(tmp_path, "--batch_size", 9))
    assert refused.code == 2 and "made with batch_size = 7, now it is 9" in refused.err


def test_what_a_killed_run_left_behind_is_swept_up(
    fake_run: FakeRun, tmp_path: Path, cli: Cli
) -> None:
    assert cli("infer", *fake_run.flags(tmp_path)).code == 0
    old, new = (
        tmp_path / "null" / "train" / "fold_0" / f".part-00000.parquet.{name}.tmp"
        for name in ("old", "new")
    )
    for path in (old, new):
        path.write_bytes(b"half a part")
    os.utime(old, (1, 1))
    assert cli("infer", *fake_run.flags(tmp_path)).out.startswith("up to date")
    assert new.exists() and not old.exists(), (
        "the new one may belong to a run that goes on beside this one"
    )


def test_ids_are_read_whatever_the_other_columns_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of a few bytes: no row is cut, not even where a text holds a line end or a quote."""
    from isic import tables
    from isic.metadata import read_ids

    rows = ['A1,"two\nlines",1', 'A2,"a ""quoted"" word",2', "A3,plain,3", 'A4,",",4']
    path = tmp_path / "table.csv"
    path.write_bytes(("isic_id,text,number\n" + "\n".join(rows)).encode())
    for size in (1, 7, 16, 1000):
        monkeypatch.setattr(tables, "CSV_BLOCK", size)
        assert read_ids(path).to_list() == ["A1", "A2", "A3", "A4"]
    for text, words in (
        ("isic_id,x\nA,1\nA,2\n", "1 duplicate isic_id, the first is A"),
        ("isic_id,x\n,1\n", "1 rows have no isic_id"),
        ("isic_id,x\n", "no rows"),
        ("name,x\nA,1\n", "lacks the column isic_id"),
        ("", "not a readable table"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            read_ids(path)
    pl.DataFrame({"x": [1], "isic_id": ["P"]}).write_parquet(tmp_path / "table.parquet")
    assert read_ids(tmp_path / "table.parquet").to_list() == ["P"]


def test_a_fold_plan_that_is_not_the_engines_is_refused(
    fake_run: FakeRun, tmp_path: Path, cli: Cli
) -> None:
    model_dir = shutil.copytree(fake_run.model_dir, tmp_path / "null")
    folds = read_folds(model_dir / "folds.parquet")
    shifted = folds.table.with_columns((pl.col("fold") + 1) % 3)
    type(folds)(shifted).write(model_dir / "folds.parquet")
    ended = cli("infer", *FakeRun(fake_run.data, model_dir).flags(tmp_path / "out"))
    assert ended.code == 2 and "was trained with the fold plan" in ended.err


def test_images_that_were_replaced_are_noticed(tmp_path: Path, cli: Cli) -> None:
    """In a folder of as many files of the same names, and in a file of the same size."""
    fake_run = make_fake_run(tmp_path / "made", num_images=40)
    folder, file = fake_run.data / "train-image", fake_run.data / "train-image.hdf5"
    names = pl.read_csv(fake_run.data / "train-metadata.csv")["isic_id"].to_list()
    images = [jpeg(16 + row) for row in range(len(names))]

    def write_folder(order: list[bytes]) -> None:
        folder.mkdir(exist_ok=True)
        for name, image in zip(names, order, strict=True):
            (folder / f"{name}.jpg").write_bytes(image)

    for write in (
        lambda order: write_hdf5(file, dict(zip(names, order, strict=True))),
        write_folder,
    ):
        for path in (tmp_path / "out", file):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        write(images)
        assert cli("infer", *fake_run.flags(tmp_path / "out")).code == 0
        assert cli("infer", *fake_run.flags(tmp_path / "out")).out.startswith("up to date")
        write(images[1:] + images[:1])
        ended = cli("infer", *fake_run.flags(tmp_path / "out"))
        assert ended.code == 2 and "holds embeddings made with other images" in ended.err


def test_force_begins_anew(fake_run: FakeRun, tmp_path: Path, cli: Cli) -> None:
    assert cli("infer", *fake_run.flags(tmp_path)).code == 0
    assert cli("infer", *fake_run.flags(tmp_path)).out.startswith("up to date")
    (tmp_path / "null" / "train" / "plan.json").write_text("half")
    assert cli("infer", *fake_run.flags(tmp_path, "--force")).out.startswith("embedded ")


def test_a_fold_without_an_engine_is_told_of(fake_run: FakeRun, tmp_path: Path, cli: Cli) -> None:
    model_dir = Path(shutil.copytree(fake_run.model_dir, tmp_path / "null"))
    (model_dir / "fold_1" / NULL_FILE).unlink()
    ended = cli("infer", *FakeRun(fake_run.data, model_dir).flags(tmp_path / "out"))
    assert ended.code == 0 and "note: fold_1 in" in ended.out and "are not embedded" in ended.out


def test_a_precision_is_of_a_format(fake_run: FakeRun, tmp_path: Path, cli: Cli) -> None:
    ended = cli("infer", *fake_run.flags(tmp_path, "--precision", "int8"))
    assert ended.code == 2 and "add --format onnx" in ended.err
    ended = cli("infer", *fake_run.flags(tmp_path, "--format", "onnx", "--precision", "int8"))
    assert (
        ended.code == 2
        and "export --config null --formats onnx --precision int8` first" in ended.err
    )


def test_the_lists_of_training_images_go_along(fake_run: FakeRun, tmp_path: Path, cli: Cli) -> None:
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
    assert {thread.name for thread in set(threading.enumerate()) - before} <= {"Thread-1"}, (
        "tqdm's monitor at most"
    )


def test_settings_that_contradict_each_other_are_refused(
    fake_run: FakeRun, tmp_path: Path, cli: Cli
) -> None:
    ended = cli("infer", *fake_run.flags(tmp_path, "--ray", "local", "--num_processes", 2))
    assert ended.code == 2 and "leave out --num_processes" in ended.err


@pytest.mark.parametrize("place", ["null/train/plan.json", "null/folds.parquet"])
def test_what_is_no_embedding_run_stays_as_it_is(
    fake_run: FakeRun, tmp_path: Path, cli: Cli, place: str
) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    (path.parent / "notes.txt").write_text("mine")
    ended = cli("infer", *fake_run.flags(tmp_path, "--force"))
    assert ended.code == 2 and "was not written by this command" in ended.err
    assert path.read_text() == "{}" and (path.parent / "notes.txt").read_text() == "mine"


def test_a_dataset_is_no_place_for_embeddings(fake_run: FakeRun, tmp_path: Path, cli: Cli) -> None:
    shutil.copytree(fake_run.data, tmp_path / "null")
    ended = cli("infer", *fake_run.flags(tmp_path))
    assert ended.code == 2 and "holds a dataset" in ended.err
    assert not (tmp_path / "null" / "folds.parquet").exists()


@pytest.mark.parametrize("name", ["*", "[a", "", "/etc/passwd", "../fold_0/model.null", "**"])
def test_an_engine_is_a_file_name_and_no_pattern(
    fake_run: FakeRun, tmp_path: Path, cli: Cli, name: str
) -> None:
    model_dir = Path(shutil.copytree(fake_run.model_dir, tmp_path / "null"))
    shutil.copytree(model_dir / "fold_0", model_dir / "fold_0_old")
    flags = FakeRun(fake_run.data, model_dir).flags(tmp_path / "out")
    assert cli("infer", *flags).code == 0, "a copy of a fold is no fold"
    ended = cli("infer", *flags, "--force", f"--format={name}")
    assert ended.code == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1
