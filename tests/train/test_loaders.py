import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from isic.layout import LAST_CHECKPOINT
from isic.preprocess import Pixels
from tests.support.commands import ROOT, TINY, tiny_settings
from tests.support.datasets import small_table, write_hdf5
from tests.support.processes import LONG_EPOCHS, started, wait_for
from tests.support.training import CPU
from train.augmentation.pipeline import create_augmentation
from train.batch import NO_MASK
from train.decoded import DecodedImages
from train.loaders import LesionImages, fold_loaders
from train.model import preprocess_spec
from train.rows import load_data


def test_masks_are_augmented_with_their_images(small_dataset: Path, tmp_path: Path) -> None:
    """Of an image with a bright corner and its mask, both have the same corner afterwards."""
    image = np.full((32, 32, 3), 20, np.uint8)
    image[:12, :9] = 220
    png = cv2.imencode(".png", image)[1].tobytes()
    write_hdf5(small_dataset / "train-image.hdf5", dict.fromkeys(small_table()["isic_id"], png))
    mask = cv2.imencode(".png", (image > 100).astype(np.uint8)[..., 0] * 255)[1].tobytes()
    write_hdf5(small_dataset / "masks.hdf5", dict.fromkeys(small_table()["isic_id"][:30], mask))
    settings = tiny_settings(data=small_dataset, output_dir=tmp_path, mask_weight=1.0)
    data = load_data(settings)
    decoded = DecodedImages(data.rows, preprocess_spec(settings))
    images = LesionImages(data.target, decoded, create_augmentation("light"))
    for seed in range(8):
        pixels, _, _, augmented_mask, _ = images[3, seed]
        assert ((pixels[..., 0] > 110) == augmented_mask).mean() > 0.99
    assert (images[40, 0][3] == NO_MASK).all(), "an image without a mask"


def test_kept_pixels_survive_a_transform_that_writes_into_its_input(
    small_dataset: Path, tmp_path: Path
) -> None:
    class Blacken:
        def set_random_seed(self, seed: int) -> None: ...

        def __call__(self, image: Pixels) -> dict[str, Pixels]:
            image[:] = 0
            return {"image": image}

    settings = tiny_settings(data=small_dataset, output_dir=tmp_path)
    data = load_data(settings)
    decoded = DecodedImages(data.rows, preprocess_spec(settings))
    decoded.keep(np.arange(5), mmap.mmap(-1, 5 * decoded.row_bytes))
    before = decoded.kept_images.copy()
    for row in range(6):
        assert not LesionImages(data.target, decoded, Blacken())[row, 0][0].any()
    assert (decoded.kept_images == before).all()


def test_the_epoch_that_predicts_all_held_out_rows_costs_more(
    small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.sampling.SUBSET_NEGATIVES", 2)
    settings = tiny_settings(data=small_dataset, output_dir=tmp_path, epochs=4, batch_size=4)
    data = load_data(settings)
    loaders = fold_loaders(data, 0, preprocess_spec(settings), settings, CPU)
    costs = loaders.epoch_costs(settings)
    assert costs.sum() == pytest.approx(4)
    held_out = data.target[data.fold == 0]
    num_trained = len(list(loaders.training.sampler))
    num_predicted = [held_out.sum() + 2] * 3 + [len(held_out)]
    assert costs / costs[0] == pytest.approx(
        [(3 * num_trained + rows) / (3 * num_trained + num_predicted[0]) for rows in num_predicted]
    )


def run_with_shared_memory(size: str, script: str) -> subprocess.CompletedProcess[str]:
    """Run Python with a /dev/shm of that size; skips the test if this user may not mount it."""
    unshare = ["unshare", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    if subprocess.run([*unshare, mount], capture_output=True, check=False).returncode:
        pytest.skip("only root may mount another /dev/shm")
    return subprocess.run(
        [*unshare, f'{mount} && exec "$@"', "sh", sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


CLAIM_MORE = "import shutil; shutil.disk_usage = lambda path: type('Usage', (), {'free': 2**30})"
"""Reports free memory that another program is about to take."""


@pytest.mark.slow
@pytest.mark.parametrize("claim", ["", CLAIM_MORE], ids=["small", "taken"])
def test_too_little_shared_memory_is_reported(
    claim: str, small_dataset: Path, tmp_path: Path
) -> None:
    flags = ["--data", small_dataset, "--output_dir", tmp_path, "--epochs", 1, "--fold", 0]
    flags += ["--batch_size", 16, "--image_size", 64, "--positive_repeats", 8, "--num_workers", 4]
    arguments = [str(part) for part in ("train", *TINY, *flags)]
    script = (
        f"{claim}\nimport runpy, sys\nsys.argv = {arguments!r}\n"
        "runpy.run_module('train', run_name='__main__')"
    )
    ended = run_with_shared_memory("1m", script)
    assert "Traceback" not in ended.stderr
    assert "--shm-size" in ended.stderr
    assert "--num_workers" in ended.stderr
    if claim:
        assert ended.returncode == 2
        assert "error: the image-decoding workers ran out of shared memory" in ended.stderr
    else:
        assert ended.returncode == 0, ended.stderr
        warning = "MB for the batches of 4 workers; 2 are used, with one batch each"
        assert ended.stderr.count(warning) == 1


FAIL_TO_SEND = """
import multiprocessing.queues, os
parent = os.getpid()
class Pickler(multiprocessing.queues._ForkingPickler):
    @classmethod
    def dumps(cls, item, protocol=None):
        if os.getpid() != parent:
            raise RuntimeError("{message}")
        return super().dumps(item, protocol)
multiprocessing.queues._ForkingPickler = Pickler
"""
"""Makes every loader worker fail to hand a batch over."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("message", "sentence", "num_tracebacks"),
    [
        ("unable to allocate shared memory(shm)", "workers ran out of shared memory", 0),
        ("the batch is broken", "an image-decoding worker died", 1),
    ],
)
def test_a_batch_that_cannot_be_sent_ends_the_run(
    message: str, sentence: str, num_tracebacks: int, small_dataset: Path, tmp_path: Path
) -> None:
    flags = ["--data", small_dataset, "--output_dir", tmp_path, "--epochs", 1, "--fold", 0]
    arguments = [str(part) for part in ("train", *TINY, *flags, "--num_workers", 1)]
    script = (
        f"{FAIL_TO_SEND.format(message=message)}\nimport runpy, sys\nsys.argv = {arguments!r}\n"
        "runpy.run_module('train', run_name='__main__')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert sentence in ended.stderr
    assert ended.stderr.count("Traceback") == num_tracebacks


def loader_processes(parent: int) -> list[int]:
    """Return the loader workers of a process, without torch's resource tracker."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [
        int(child)
        for child in children
        if "-m\0train" in Path(f"/proc/{child}/cmdline").read_text()
    ]


@pytest.mark.slow
def test_a_killed_worker_is_reported(small_dataset: Path, tmp_path: Path) -> None:
    flags = [
        *LONG_EPOCHS.split(),
        "--data",
        small_dataset,
        "--output_dir",
        tmp_path,
        "--num_workers",
        1,
    ]
    with started(*flags) as process:
        wait_for(tmp_path / "tiny" / "fold_0" / LAST_CHECKPOINT, process)
        while not (workers := loader_processes(process.pid)):
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(0.2)
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert "Traceback" not in err, err
    assert "error: an image-decoding worker died" in err
    assert "--resume" in err
