"""The baselines of `benchmarks peers`: from ids to features, each in a process of its own.

The first is this toolkit. The others follow the documentation of the libraries that they use. Each
line on a process's standard input names a dataset folder, and it answers with the seconds.
"""

# Libraries are imported by the baselines that use them, so that no process pays for the others.

import io
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.timing import batches
from isic.runtime.files import read_json

Features = NDArray[np.float32]
Embed = Callable[[Path], Features]
"""Embeds the images of a task from the file of a dataset folder."""

IMAGE_FILE = "train-image.hdf5"
AUTOCAST = {"fp32": None, "fp16": "float16", "bf16": "bfloat16"}
"""Name in torch of the type that layers are autocast to, by precision."""
PROVIDER_OF_DEVICE = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""Execution provider of ONNX Runtime by device."""
PIL_BILINEAR = 2


@dataclass(frozen=True)
class Task:
    """The work, the same for every baseline but for its name, folder, precision and artifact."""

    baseline: str
    """A key of BASELINES."""
    data: str
    """The dataset folder that is timed."""
    folder: str
    """For the baseline's own files."""
    ids: list[str]
    model: str
    """timm's name."""
    options: dict[str, Any]
    """Arguments of timm's create_model."""
    weights: str
    """Weights of the backbone, as safetensors."""
    num_features: int
    size: int
    mean: list[float]
    std: list[float]
    batch: int
    num_workers: int
    device: str
    precision: str
    """Of the network; a key of AUTOCAST for all baselines but this toolkit."""
    artifact: str | None = None
    manifest: dict[str, Any] | None = None


def infer_embed(task: Task) -> Embed:
    """This toolkit: the pipeline of `python -m infer embed`, from the image file to shards."""
    import polars as pl  # noqa: PLC0415

    from infer.embedding.embedder import Embedder, EmbedJob  # noqa: PLC0415
    from infer.embedding.models import Models  # noqa: PLC0415
    from infer.embedding.shards import plan_shards  # noqa: PLC0415
    from infer.engines import manifest_spec  # noqa: PLC0415
    from isic.tables import read_parquet  # noqa: PLC0415

    assert task.artifact is not None
    assert task.manifest is not None
    models = Models({0: Path(task.artifact)}, {0: task.manifest}, manifest_spec(task.manifest))
    root = Path(task.folder) / "parts"

    @cache
    def embedder(data: Path) -> Embedder:
        return Embedder.open(
            EmbedJob(data, "train", models, task.device, "float32", "none", task.batch, None, None)
        )

    # Opened before the first timed run.
    embedder(Path(task.data))  # raises now if the engine cannot run here

    def embed(data: Path) -> Features:
        shutil.rmtree(root, ignore_errors=True)
        ids = pl.Series("isic_id", task.ids)
        parts = plan_shards(root, "train", ids, models.folds, None, "all")
        embedder(data).run(parts, lambda step: None)
        tables = [read_parquet(part.paths[0]) for part in parts]
        features = [np.asarray(table["features"].to_numpy(), np.float32) for table in tables]
        return np.concatenate(features)

    return embed


def timm_eager(task: Task, compiled: bool = False) -> Embed:
    """timm's model and transform, h5py and PIL in a torch Dataset, a DataLoader with workers."""
    import torch  # noqa: PLC0415

    model = _timm_model(task).to(task.device)
    if compiled:
        model.compile()
    transform = _timm_transform(task)

    class Images(torch.utils.data.Dataset[torch.Tensor]):
        file: Any = None

        def __init__(self, data: Path) -> None:
            self.data = data

        def __len__(self) -> int:
            return len(task.ids)

        def __getitem__(self, row: int) -> torch.Tensor:
            self.file = self.file or _open(self.data)  # once per worker: a file cannot be pickled
            tensor: torch.Tensor = transform(_picture(self.file, task.ids[row]))
            return tensor

    @torch.inference_mode()
    def embed(data: Path) -> Features:
        pin_memory = task.device == "cuda"
        loader = torch.utils.data.DataLoader(
            Images(data), task.batch, num_workers=task.num_workers, pin_memory=pin_memory
        )
        uploaded = (images.to(task.device, non_blocking=True) for images in loader)
        with _autocast(task):
            parts = [model(images).float().cpu() for images in uploaded]
        return np.asarray(torch.cat(parts).numpy(), np.float32)

    return embed


def timm_compiled(task: Task) -> Embed:
    return timm_eager(task, compiled=True)


def ray_data(task: Task) -> Embed:
    """Ray Data: tasks that decode with h5py and timm's transform, an actor with timm's model."""
    import ray  # noqa: PLC0415
    import ray.data  # noqa: PLC0415
    import torch  # noqa: PLC0415

    torch_threads = torch.get_num_threads()
    on_gpu = task.device == "cuda"
    ray.init(num_cpus=max(1, task.num_workers), include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False

    class Network:
        def __init__(self) -> None:
            # Ray gives a process as many threads as it reserves cores.
            torch.set_num_threads(torch_threads)
            self.model = _timm_model(task).to(task.device)

        @torch.inference_mode()
        def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            images = torch.from_numpy(batch["image"].copy()).to(task.device)
            with _autocast(task):
                features = self.model(images).float().cpu().numpy()
            return {"row": batch["row"], "features": features}

    def embed(data: Path) -> Features:
        def decode(batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            transform = _timm_transform(task)
            with _open(data) as file:
                images = [transform(_picture(file, name)).numpy() for name in batch["id"]]
            return {"row": batch["row"], "image": np.stack(images)}

        items = [{"row": row, "id": name} for row, name in enumerate(task.ids)]
        results = (
            ray.data.from_items(items)
            .map_batches(decode, batch_size=task.batch)
            .map_batches(
                Network,
                batch_size=task.batch,
                compute=ray.data.ActorPoolStrategy(size=1),
                num_cpus=0,  # the cores are for the tasks that decode
                num_gpus=1 if on_gpu else 0,
            )
        )
        # The rows of its blocks come in any order.
        features = np.empty((len(task.ids), task.num_features), np.float32)
        for batch in results.iter_batches(batch_size=None):
            features[batch["row"]] = batch["features"]
        return features

    return embed


def onnx_loop(task: Task) -> Embed:
    """The exported backbone in an ONNX Runtime session, fed by a loop of h5py, PIL and numpy."""
    import onnxruntime  # noqa: PLC0415

    path = Path(task.folder) / "backbone.onnx"
    _export_onnx(task, path)
    provider = PROVIDER_OF_DEVICE[task.device]
    options = {"use_tf32": "0"} if task.device == "cuda" else {}
    session = onnxruntime.InferenceSession(str(path), providers=[(provider, options)])
    if session.get_providers()[0] != provider:
        raise RuntimeError(f"ONNX Runtime has no {provider} here")
    input_name = session.get_inputs()[0].name
    mean = np.array(task.mean, np.float32)
    std = np.array(task.std, np.float32)

    def load(file: Any, name: str) -> NDArray[np.float32]:
        picture = _picture(file, name).resize((task.size, task.size), PIL_BILINEAR)
        pixels = (np.asarray(picture, np.float32) / 255 - mean) / std
        return np.asarray(pixels.transpose(2, 0, 1), np.float32)

    def embed(data: Path) -> Features:
        parts = []
        with _open(data) as file:
            for names in batches(task.ids, task.batch):
                images = np.stack([load(file, name) for name in names])
                parts.append(session.run(None, {input_name: images})[0])
        return np.concatenate(parts)

    return embed


BASELINES: dict[str, Callable[[Task], Embed]] = {
    "infer embed": infer_embed,
    "timm eager + DataLoader": timm_eager,
    "timm torch.compile + DataLoader": timm_compiled,
    "ONNX Runtime loop, h5py + PIL": onnx_loop,
    "Ray Data + timm": ray_data,
}
"""How to open each baseline, by its name in the results; the first is this toolkit."""


def _autocast(task: Task) -> AbstractContextManager[Any]:
    import torch  # noqa: PLC0415

    torch.backends.cudnn.allow_tf32 = False  # convolutions round to TF32's 10 bits by default
    name = AUTOCAST[task.precision]
    dtype = None if name is None else getattr(torch, name)
    return torch.autocast(task.device, dtype, enabled=dtype is not None)


def _export_onnx(task: Task, path: Path) -> None:
    """Export timm's model, its weights in the task's precision, with float32 input and output."""
    import torch  # noqa: PLC0415

    from benchmarks.low_precision import LowPrecision  # noqa: PLC0415

    model = _timm_model(task)
    dtype = AUTOCAST[task.precision]
    if dtype is not None:
        model = LowPrecision(model, getattr(torch, dtype)).eval()
    torch.onnx.export(
        model,
        (torch.zeros((2, 3, task.size, task.size)),),
        path,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
    )


def _timm_model(task: Task) -> Any:
    import timm  # noqa: PLC0415
    from safetensors.torch import load_file  # noqa: PLC0415

    model = timm.create_model(task.model, **task.options)
    model.load_state_dict(load_file(task.weights))
    return model.eval()


def _timm_transform(task: Task) -> Any:
    from timm.data import create_transform  # noqa: PLC0415

    return create_transform(
        (3, task.size, task.size),
        False,
        interpolation="bilinear",
        mean=task.mean,
        std=task.std,
        crop_pct=1.0,
    )


def _open(data: Path) -> Any:
    import h5py  # noqa: PLC0415

    return h5py.File(data / IMAGE_FILE)


def _picture(file: Any, name: str) -> Any:
    import PIL.Image  # noqa: PLC0415

    return PIL.Image.open(io.BytesIO(file[name][()])).convert("RGB")


def main(path: Path) -> None:
    """Open the baseline of the task at `path` and answer every line with seconds.

    The last features are next to the task, as .npy.
    """
    task = Task(**read_json(path))
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries print; standard output has the answers only
    embed = BASELINES[task.baseline](task)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        features = embed(Path(line.strip()))
        seconds = time.perf_counter() - started
        np.save(path.with_suffix(".npy"), features)
        print(seconds, file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
