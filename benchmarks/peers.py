"""`python -m benchmarks peers`: the same images and network, embedded with other libraries."""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.artifacts import ArtifactStore, BuildFailed, open_store
from benchmarks.baselines import BASELINES, IMAGE_FILE, Features, Task
from benchmarks.record import MAX_REASON, Row, print_and_append, ratio_columns
from benchmarks.settings import ALL, PeersSettings
from benchmarks.timing import repeated
from benchmarks.untrained import UntrainedModel, create_untrained, least_cosine
from isic import schema
from isic.dataset import Dataset
from isic.preprocess import PreprocessSpec, decode, resize
from isic.runtime.errors import UserError
from isic.runtime.files import write_json
from isic.runtime.machine import num_cores
from isic.synth.write import write_images
from train.timm_models import backbone_options

OURS, *PEERS = BASELINES
# torch has no autocast to an 8-bit type.
PEER_PRECISIONS = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "int8": "fp16", "fp8": "fp16"}
"""Precision of the peers on a GPU by that of ours."""


def peers(settings: PeersSettings) -> None:
    """Measure `infer embed` end to end against each peer and compare the features by cosine."""
    selected = select_peers(settings.peers)
    untrained = create_untrained(settings.config)
    dataset = Dataset(settings.data)
    ids = repeated(dataset.metadata("train")[schema.ID].to_list(), settings.images)
    request = {
        "what": untrained.settings.name,
        "data": settings.data.name,
        "images": len(ids),
        "batch": settings.batch,
    }
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name,
        open_store(settings.artifacts) as store,
    ):
        folder = Path(name)
        common = shared_fields(untrained, ids, settings, folder)
        folders = (settings.data.resolve(), write_resized(dataset, ids, untrained.spec, folder))
        for peer_precision, precisions in by_peer_precision(settings, common["device"]).items():
            ours, reasons = build_ours(untrained, common, settings, precisions, folder, store)
            for peer in selected:
                place = _subfolder(folder, f"{peer}, {peer_precision}")
                theirs = Task(baseline=peer, folder=place, precision=peer_precision, **common)
                tasks = {**ours, peer: theirs}
                rows = compare_tasks(tasks, reasons, [peer], *folders, settings.repeats)
                rows = [{**request, **row, "peer_precision": peer_precision} for row in rows]
                print_and_append("peers", rows, settings.results)


def compare_tasks(
    tasks: Mapping[str, Task],
    reasons: Mapping[str, str],
    names: list[str],
    data: Path,
    resized: Path,
    repeats: int,
) -> list[Row]:
    """Run tasks in turns, each in its own process, and return the rows that compare them.

    Args:
        tasks: by the baselines' names in the rows.
        reasons: of those of ours that did not build.
        data, resized: dataset folders with the original and with the resized images.
    """
    processes = {name: BaselineProcess(task) for name, task in tasks.items()}
    num_images = len(tasks[names[0]].ids)
    rates, features = embed_in_turns(processes, data, resized, num_images, repeats)
    failed = {name: process.reason for name, process in processes.items() if process.reason}
    return compare_all(rates, features, {**reasons, **failed}, names)


def by_peer_precision(settings: PeersSettings, device: str) -> dict[str, list[str]]:
    """Return the precisions of ours, by that of the peers."""
    # On a CPU the peers compute in float32, as people run them there; on a GPU a lower precision is
    # several times as fast, so both compute in the same.
    groups: dict[str, list[str]] = {}
    for precision in settings.precision:
        peer_precision = PEER_PRECISIONS[precision] if device == "cuda" else "fp32"
        groups.setdefault(peer_precision, []).append(precision)
    return groups


def write_resized(dataset: Dataset, ids: list[str], spec: PreprocessSpec, folder: Path) -> Path:
    """Write the images as PNGs of the network's size and return their folder."""
    # All baselines read the same pixels from these; PIL antialiases the images that it shrinks.
    ids = sorted(set(ids))
    files = []
    for data in dataset.images("train").read(ids):
        bgr = cv2.cvtColor(resize(decode(data), spec), cv2.COLOR_RGB2BGR)
        files.append(cv2.imencode(".png", bgr)[1].tobytes())
    resized = folder / "resized"
    resized.mkdir()
    write_images(resized / IMAGE_FILE, zip(ids, files, strict=True))
    return resized


def shared_fields(
    untrained: UntrainedModel, ids: list[str], settings: PeersSettings, folder: Path
) -> dict[str, Any]:
    """Write the weights and return the fields of a Task that all baselines share."""
    save_file(untrained.model.backbone.state_dict(), folder / "backbone.safetensors")
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "data": str(settings.data.resolve()),
        "ids": ids,
        "model": untrained.settings.model,
        "options": backbone_options(untrained.settings),
        "weights": str(folder / "backbone.safetensors"),
        "num_features": untrained.model.num_features,
        "size": untrained.spec.size,
        "mean": list(untrained.spec.mean),
        "std": list(untrained.spec.std),
        "batch": settings.batch,
        "num_workers": num_cores() if settings.num_workers is None else settings.num_workers,
        "device": device,
    }


def build_ours(
    untrained: UntrainedModel,
    common: dict[str, Any],
    settings: PeersSettings,
    precisions: Sequence[str],
    folder: Path,
    store: ArtifactStore,
) -> tuple[dict[str, Task], dict[str, str]]:
    """Return a task per precision of ours, and the reason for each that does not build."""
    tasks: dict[str, Task] = {}
    reasons: dict[str, str] = {}
    for precision in precisions:
        name = f"{OURS}, {settings.formats} {precision}"
        try:
            artifact = store.get(
                untrained, settings.formats, precision, common["device"], settings.batch
            )
        except BuildFailed as error:
            reasons[name] = str(error)
            continue
        tasks[name] = Task(
            baseline=OURS,
            folder=_subfolder(folder, name),
            artifact=str(artifact.path.resolve()),
            manifest=artifact.manifest,
            precision=precision,
            **common,
        )
    return tasks, reasons


def select_peers(wanted: tuple[str, ...]) -> list[str]:
    """Return the peers whose names contain a word. Raise UserError for a word without peers."""
    selected = {
        word: [name for name in PEERS if word == ALL or word.lower() in name.lower()]
        for word in wanted
    }
    for word, names in selected.items():
        if not names:
            raise UserError(
                f'--peers: no peer has "{word}" in its name; known are: {"; ".join(PEERS)}'
            )
    return [name for name in PEERS if any(name in names for names in selected.values())]


def _subfolder(parent: Path, name: str) -> str:
    folder = parent / "".join(letter if letter.isalnum() else "_" for letter in name)
    folder.mkdir()
    return str(folder)


class BaselineProcess:
    """A process with one opened baseline, which runs on request."""

    def __init__(self, task: Task) -> None:
        """Start the process and wait until it is ready; if it fails, `reason` is set."""
        self.path = Path(task.folder) / "task.json"
        write_json(self.path, asdict(task))
        command = [sys.executable, "-m", "benchmarks.baselines", str(self.path)]
        with open(self.path.with_suffix(".log"), "w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                command,
                text=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self.reason = None if self._answer() == "ready" else self._last_log_line()

    def run(self, data: Path) -> float | None:
        """Embed all images of a dataset folder once and return the seconds, None on a failure."""
        if self.reason:
            return None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process has ended: no answer will come
            self._process.stdin.write(f"{data}\n")
            self._process.stdin.flush()
        answer = self._answer()
        if not answer:
            self.reason = self._last_log_line()
        return float(answer) if answer else None

    def features(self) -> Features:
        """Return the features of the last run, [N, D] float32."""
        return np.asarray(np.load(self.path.with_suffix(".npy")), np.float32)

    def close(self) -> None:
        self._process.communicate()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return str(self._process.stdout.readline()).strip()

    def _last_log_line(self) -> str:
        self._process.communicate()
        lines = self.path.with_suffix(".log").read_text(encoding="utf-8").strip().splitlines()
        return lines[-1][:MAX_REASON] if lines else f"ended with {self._process.returncode}"


def embed_in_turns(
    processes: Mapping[str, BaselineProcess],
    data: Path,
    resized: Path,
    num_images: int,
    repeats: int,
) -> tuple[dict[str, list[float]], dict[str, dict[str, Features]]]:
    """Run the baselines in turns on a dataset, then once on its resized images, and end them.

    Returns:
        Images per second by baseline and repeat, after one repeat of warm-up, and the features by
        column of their cosine and by baseline. A baseline is omitted after it fails.
    """
    rates: dict[str, list[float]] = {name: [] for name in processes}
    for repeat in range(repeats + 1):
        for name, process in processes.items():
            seconds = process.run(data)
            if repeat and seconds:
                rates[name].append(num_images / seconds)
    features = {"cosine": _all_features(processes)}
    for process in processes.values():
        process.run(resized)
    features["cosine_same_pixels"] = _all_features(processes)
    for process in processes.values():
        process.close()
    return rates, features


def _all_features(processes: Mapping[str, BaselineProcess]) -> dict[str, Features]:
    return {name: process.features() for name, process in processes.items() if not process.reason}


def compare_all(
    rates: Mapping[str, list[float]],
    features: Mapping[str, Mapping[str, Features]],
    reasons: Mapping[str, str],
    names: list[str],
) -> list[Row]:
    """Return a row for each of ours and each peer: rates, their ratios, and the least cosines.

    `features` are by column of the cosine and by baseline.
    """
    ours = [name for name in dict.fromkeys((*rates, *reasons)) if name.startswith(OURS)]
    rows: list[Row] = []
    for own in ours:
        for peer in names:
            row: Row = {"ours": own, "peer": peer}
            reason = reasons.get(own) or reasons.get(peer)
            if reason:
                row["reason"] = reason
            else:
                row |= _comparison(rates[own], rates[peer])
                for column, of in features.items():
                    row[column] = round(least_cosine(of[own], of[peer]), 7)
            rows.append(row)
    return rows


def _comparison(ours: Sequence[float], theirs: Sequence[float]) -> Row:
    return {
        "ours_images_per_second": round(statistics.median(ours), 1),
        "images_per_second": round(statistics.median(theirs), 1),
        **ratio_columns("ratio", ours, theirs, digits=2),
    }
