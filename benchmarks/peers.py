"""`python -m benchmarks peers`: embedding the same images with the same network the way people do it today."""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from pydantic import Field
from safetensors.torch import save_file

from benchmarks.fresh import Features, Fresh, build_artifact, create_fresh, least_cosine
from benchmarks.record import Row, ratio, reason, write
from benchmarks.ways import FILE, WAYS, Task
from isic import schema
from isic.dataset import Dataset
from isic.preprocess import PreprocessSpec, decode, resize
from isic.runtime.config import Settings, Several
from isic.runtime.errors import UserError
from isic.runtime.files import write_json
from isic.runtime.machine import num_cores
from isic.synth.write import write_images
from train.timm_models import backbone_options

OURS = next(iter(WAYS))
PEER_PRECISIONS = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "int8": "fp16", "fp8": "fp16"}
"""The precision of the peers beside each of ours on a GPU; torch autocasts to no type of 8 bits."""


class PeersSettings(Settings):
    """What `python -m benchmarks peers` takes."""

    config: str = Field(
        "vit_tiny", description="config whose network, with fresh weights, embeds the images"
    )
    data: Path = Field(Path("data/isic-2024"), description="dataset folder with train-image.hdf5")
    format: str = Field("onnx", description="format of ours")
    precision: Several[str] = Field(
        ("fp32",),
        description="precisions of ours; on a GPU the peers compute in the same, else in float32",
    )
    peers: Several[str] = Field(
        ("all",), description="parts of the peers' names, separated by commas, or all"
    )
    images: int = Field(512, ge=1, description="images a repeat")
    batch: int = Field(16, ge=1, description="images a call of the network")
    repeats: int = Field(5, ge=1, description="repeats, in which all ways take turns")
    num_workers: int | None = Field(
        None, ge=0, description="of the peers' DataLoader; one a core if not given"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the network runs")
    hf: Path | None = Field(
        None,
        description="folder with transformers and optimum, which want an older huggingface_hub than the rest: "
        "pip install --no-deps --target FOLDER optimum-onnx optimum transformers==4.57.6 tokenizers==0.22.2 "
        "huggingface_hub==0.36.2 regex",
    )
    results: Path | None = Field(
        None, description="folder of the CSV; benchmarks/results if not given"
    )


def peers(settings: PeersSettings) -> None:
    """Measures `infer embed` end to end beside each of its peers, in turns, and compares their features by cosine.

    Once as each reads the images, and once from the very same pixels: PIL antialiases where it shrinks an image, and
    rounds otherwise, which is no matter of the network.
    """
    others = chosen_peers(settings.peers)
    fresh = create_fresh(settings.config)
    dataset = Dataset(settings.data)
    ids = dataset.metadata("train")[schema.ID].to_list()[: settings.images]
    asked = {
        "what": fresh.settings.name,
        "data": settings.data.name,
        "images": len(ids),
        "batch": settings.batch,
    }
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        common = describe(fresh, ids, settings, Path(folder))
        resized = write_resized(dataset, ids, fresh.spec, Path(folder))
        for peer_precision, precisions in by_peer_precision(settings, common["device"]).items():
            ours, reasons = build_ours(fresh, common, settings, precisions, Path(folder))
            for peer in others:
                place = _folder(Path(folder), f"{peer}, {peer_precision}")
                task = Task(way=peer, folder=place, precision=peer_precision, **common)
                ways = {name: Way(each, settings.hf) for name, each in {**ours, peer: task}.items()}
                rates, features = embed_in_turns(
                    ways, settings.data.resolve(), resized, len(ids), settings.repeats
                )
                failed = {name: way.reason for name, way in ways.items() if way.reason}
                rows = compare_all(rates, features, {**reasons, **failed}, [peer])
                both = {"peer_precision": peer_precision}
                write("peers", [{**asked, **row, **both} for row in rows], settings.results)


def by_peer_precision(settings: PeersSettings, device: str) -> dict[str, list[str]]:
    """Return the precisions of ours, by that of the peers beside them.

    On a CPU the peers compute in float32, which is what people run there; on a GPU the same
    network in a lower precision is several times as fast, so both compute in the same.
    """
    groups: dict[str, list[str]] = {}
    for precision in settings.precision:
        peer_precision = PEER_PRECISIONS[precision] if device == "cuda" else "fp32"
        groups.setdefault(peer_precision, []).append(precision)
    return groups


def write_resized(dataset: Dataset, ids: list[str], spec: PreprocessSpec, folder: Path) -> Path:
    """Writes the images as PNGs of the network's size, which every way reads alike. Returns their folder."""
    pixels = [resize(decode(data), spec) for data in dataset.images("train").read(ids)]
    files = [
        cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()
        for image in pixels
    ]
    resized = folder / "resized"
    resized.mkdir()
    write_images(resized / FILE, sorted(zip(ids, files, strict=True)))
    return resized


def describe(fresh: Fresh, ids: list[str], settings: PeersSettings, folder: Path) -> dict[str, Any]:
    """Returns the fields of a Task that are the same for every way, and writes the weights."""
    save_file(fresh.model.backbone.state_dict(), folder / "backbone.safetensors")
    device = (
        ("cuda" if torch.cuda.is_available() else "cpu")
        if settings.device == "auto"
        else settings.device
    )
    return {
        "data": str(settings.data.resolve()),
        "ids": ids,
        "model": fresh.settings.model,
        "options": backbone_options(fresh.settings),
        "weights": str(folder / "backbone.safetensors"),
        "num_features": fresh.model.num_features,
        "size": fresh.spec.size,
        "mean": list(fresh.spec.mean),
        "std": list(fresh.spec.std),
        "batch": settings.batch,
        "num_workers": num_cores() if settings.num_workers is None else settings.num_workers,
        "device": device,
    }


def build_ours(
    fresh: Fresh,
    common: dict[str, Any],
    settings: PeersSettings,
    precisions: Sequence[str],
    folder: Path,
) -> tuple[dict[str, Task], dict[str, str]]:
    """Returns a task for each precision of ours, and why there is none for the others."""
    tasks, reasons = {}, {}
    for precision in precisions:
        name = f"{OURS}, {settings.format} {precision}"
        try:
            artifact = build_artifact(
                fresh, settings.format, precision, folder, common["device"], settings.batch
            )
        except Exception as error:  # of any type, and it costs this precision alone
            reasons[name] = reason(error)
            continue
        own: dict[str, Any] = {
            "way": OURS,
            "folder": _folder(folder, name),
            "artifact": str(artifact.path),
            "precision": precision,
        }
        tasks[name] = Task(**own, manifest=artifact.manifest, **common)
    return tasks, reasons


def chosen_peers(wanted: tuple[str, ...]) -> list[str]:
    """Returns the peers that a flag names by parts of their names. Raises UserError for one that there is not."""
    known = [name for name in WAYS if name != OURS]
    for part in wanted:
        if part != "all" and not any(part in name for name in known):
            raise UserError(
                f'--peers: no peer has "{part}" in its name; there are {"; ".join(known)}'
            )
    return [name for name in known if any(part == "all" or part in name for part in wanted)]


def _folder(parent: Path, name: str) -> str:
    folder = parent / "".join(letter if letter.isalnum() else "_" for letter in name)
    folder.mkdir()
    return str(folder)


class Way:
    """A way in its own process, opened and waiting to be told to run."""

    def __init__(self, task: Task, extra: Path | None) -> None:
        """Starts it and waits until it is ready. `reason` says why it is not, if it is not."""
        self.path = Path(task.folder) / "task.json"
        write_json(self.path, asdict(task))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        if extra and ("transformers" in task.way or "optimum" in task.way):
            environment["PYTHONPATH"] = os.pathsep.join(
                [str(extra.resolve()), os.environ.get("PYTHONPATH", "")]
            )
        command = [sys.executable, "-m", "benchmarks.ways", str(self.path)]
        with open(self.path.with_suffix(".log"), "w", encoding="utf-8") as log:
            pipes: dict[str, Any] = {
                "stdin": subprocess.PIPE,
                "stdout": subprocess.PIPE,
                "stderr": log,
            }
            self._process = subprocess.Popen(command, text=True, env=environment, **pipes)
        self.reason = None if self._answer() == "ready" else self._complaint()

    def run(self, data: Path) -> float | None:
        """Embeds all images, as a dataset folder has them, once and returns the seconds.

        None where it has failed, now or before; `reason` then says why.
        """
        if self.reason:
            return None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended since, and no answer comes
            self._process.stdin.write(f"{data}\n")
            self._process.stdin.flush()
        answer = self._answer()
        if not answer:
            self.reason = self._complaint()
        return float(answer) if answer else None

    def features(self) -> Features:
        """Returns what it computed last, [N, D] float32."""
        return np.asarray(np.load(self.path.with_suffix(".npy")), np.float32)

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return str(self._process.stdout.readline()).strip()

    def _complaint(self) -> str:
        self._process.communicate()
        lines = self.path.with_suffix(".log").read_text(encoding="utf-8").strip().splitlines()
        return lines[-1][:200] if lines else f"ended with {self._process.returncode}"


def embed_in_turns(
    ways: Mapping[str, Way], data: Path, resized: Path, num_images: int, repeats: int
) -> tuple[dict[str, list[float]], dict[str, dict[str, Features]]]:
    """Has ways embed a dataset's images in turns, then the same ones in the network's size, and ends them.

    Returns:
        Images per second by way and repeat, after one repeat to warm up, and the features by column of their cosine and
        by way. A way that fails is left out from then on.
    """
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            seconds = way.run(data)
            rates[name] += [num_images / seconds] if repeat and seconds else []
    features = {"cosine": {name: way.features() for name, way in ways.items() if not way.reason}}
    for way in ways.values():
        way.run(resized)
    features["cosine_same_pixels"] = {
        name: way.features() for name, way in ways.items() if not way.reason
    }
    for way in ways.values():
        way.close()
    return rates, features


def compare_all(
    rates: Mapping[str, list[float]],
    features: Mapping[str, Mapping[str, Features]],
    reasons: Mapping[str, str],
    names: list[str],
) -> list[Row]:
    """Returns a row for each of ours and each peer: rates, their ratio with its spread, and the least cosines.

    `features` holds those of every way by the column that their cosine goes to.
    """
    ours = [name for name in dict.fromkeys((*rates, *reasons)) if name.startswith(OURS)]
    rows: list[Row] = []
    for own in ours:
        for peer in names:
            row: dict[str, Any] = {"ours": own, "peer": peer}
            missing = reasons.get(own) or reasons.get(peer)
            if missing:
                rows.append({**row, "reason": missing})
                continue
            row |= {
                "ours_images_per_second": round(statistics.median(rates[own]), 1),
                "images_per_second": round(statistics.median(rates[peer]), 1),
                **ratio("ratio", rates[own], rates[peer], digits=2),
            }
            rows.append(
                row
                | {name: round(least_cosine(of[own], of[peer]), 7) for name, of in features.items()}
            )
    return rows
