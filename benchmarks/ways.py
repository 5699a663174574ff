"""The ways to turn ids into features that `benchmarks peers` compares, each in a process of its own.

All but the first are written with other people's libraries, as their own documentation does it. A way is opened once;
then each line on standard input names a dataset folder whose images it embeds, and it answers with the seconds.
"""

import io
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isic.runtime.files import read_json

Features = NDArray[np.float32]
Embed = Callable[[Path], Features]
"""Embeds the images of a task in the file of a dataset folder."""

FILE = "train-image.hdf5"
AUTOCAST = {"fp32": None, "fp16": "float16", "bf16": "bfloat16"}
"""torch's name of the type that its layers are autocast to, by precision."""


@dataclass(frozen=True)
class Task:
    """The same work for every way."""

    way: str
    data: str
    """The dataset folder that is timed."""
    folder: str
    """For what a way writes."""
    ids: list[str]
    model: str
    """timm's name."""
    options: dict[str, Any]
    weights: str
    """The backbone's, as safetensors."""
    num_features: int
    size: int
    mean: list[float]
    std: list[float]
    batch: int
    num_workers: int
    device: str
    precision: str
    """What the network computes in, a key of AUTOCAST for all ways but ours."""
    artifact: str | None = None
    manifest: dict[str, Any] | None = None


def ours(task: Task) -> Embed:
    """The pipeline of `python -m infer embed` with an exported artifact, from the file to parts on disk."""
    import polars as pl  # noqa: PLC0415  each way brings its own libraries, here and below

    from infer.embedding.embedder import Embedder, EmbedJob  # noqa: PLC0415
    from infer.embedding.models import Models  # noqa: PLC0415
    from infer.embedding.shards import plan_shards  # noqa: PLC0415
    from infer.engines import manifest_spec  # noqa: PLC0415
    from isic.tables import read_parquet  # noqa: PLC0415

    assert task.artifact is not None and task.manifest is not None
    models = Models({0: Path(task.artifact)}, {0: task.manifest}, manifest_spec(task.manifest))
    root = Path(task.folder) / "parts"

    @cache
    def embedder(data: Path) -> Embedder:
        return Embedder(
            EmbedJob(data, "train", models, task.device, "float32", "none", task.batch, None, None)
        )

    embedder(Path(task.data))  # an engine that does not work here says so before it takes turns

    def embed(data: Path) -> Features:
        shutil.rmtree(root, ignore_errors=True)
        parts = plan_shards(
            root, "train", pl.Series("isic_id", task.ids), models.folds, None, "all"
        )
        embedder(data).run(parts, lambda step: None)
        tables = [read_parquet(part.paths[0]) for part in parts]
        return np.concatenate(
            [np.asarray(table["features"].to_numpy(), np.float32) for table in tables]
        )

    return embed


def timm_eager(task: Task, compiled: bool = False) -> Embed:
    """timm's model and transform, h5py and PIL in a torch Dataset, a DataLoader with workers."""
    import torch  # noqa: PLC0415
    from timm.data import create_transform  # noqa: PLC0415

    model = _timm_model(task).to(task.device)
    if compiled:
        model.compile()
    transform = create_transform(
        (3, task.size, task.size),
        False,
        interpolation="bilinear",
        mean=task.mean,
        std=task.std,
        crop_pct=1.0,
    )

    class Images(torch.utils.data.Dataset[torch.Tensor]):
        file: Any = None

        def __init__(self, data: Path) -> None:
            self.data = data

        def __len__(self) -> int:
            return len(task.ids)

        def __getitem__(self, row: int) -> torch.Tensor:
            self.file = self.file or _open(self.data)  # once in each worker
            tensor: torch.Tensor = transform(_picture(self.file, task.ids[row]))
            return tensor

    @torch.inference_mode()
    def embed(data: Path) -> Features:
        loader = torch.utils.data.DataLoader(
            Images(data), task.batch, num_workers=task.num_workers, pin_memory=task.device == "cuda"
        )
        uploaded = (images.to(task.device, non_blocking=True) for images in loader)
        with _autocast(task):
            parts = [model(images).float().cpu() for images in uploaded]
        return np.asarray(torch.cat(parts).numpy(), np.float32)

    return embed


def timm_compiled(task: Task) -> Embed:
    """The same through torch.compile."""
    return timm_eager(task, compiled=True)


def onnx_loop(task: Task) -> Embed:
    """The backbone exported as it is, h5py and PIL in a loop, normalised in numpy, an ONNX Runtime session."""
    import onnxruntime  # noqa: PLC0415
    import torch  # noqa: PLC0415

    path = Path(task.folder) / "backbone.onnx"
    example = torch.zeros((2, 3, task.size, task.size))
    torch.onnx.export(
        _lowered_model(task),
        (example,),
        path,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
    )
    provider = PROVIDERS[task.device]
    options = {"use_tf32": "0"} if task.device == "cuda" else {}
    session = onnxruntime.InferenceSession(str(path), providers=[(provider, options)])
    if session.get_providers()[0] != provider:
        raise RuntimeError(f"ONNX Runtime has no {provider} here")
    name = session.get_inputs()[0].name
    mean, std = np.array(task.mean, np.float32), np.array(task.std, np.float32)

    def load(file: Any, key: str) -> NDArray[np.float32]:
        picture = _picture(file, key).resize((task.size, task.size), 2)  # PIL.Image.BILINEAR
        pixels = (np.asarray(picture, np.float32) / 255 - mean) / std
        return np.asarray(pixels.transpose(2, 0, 1), np.float32)

    def embed(data: Path) -> Features:
        with _open(data) as file:
            batches = (np.stack([load(file, key) for key in keys]) for keys in _batches(task))
            return np.concatenate([session.run(None, {name: batch})[0] for batch in batches])

    return embed


def transformers_pipeline(task: Task) -> Embed:
    """transformers' image-feature-extraction pipeline on PyTorch, fed from h5py and PIL by its own DataLoader."""
    from transformers import ViTImageProcessor, ViTModel, pipeline  # noqa: PLC0415

    folder = _hugging_face_model(task)
    model = ViTModel.from_pretrained(folder, add_pooling_layer=False)
    processor = ViTImageProcessor.from_pretrained(folder)
    pipe = pipeline(
        "image-feature-extraction", model=model, image_processor=processor, device=task.device
    )
    return _piped(task, pipe)


def optimum_pipeline(task: Task) -> Embed:
    """The same pipeline from optimum, which exports the model and runs it in ONNX Runtime."""
    from optimum.onnxruntime import ORTModelForFeatureExtraction  # noqa: PLC0415
    from optimum.pipelines import pipeline  # noqa: PLC0415
    from transformers import ViTImageProcessor  # noqa: PLC0415

    folder = _hugging_face_model(task)
    if task.precision != "fp32":
        raise RuntimeError(f"optimum exports no {task.precision} here")
    provider = PROVIDERS[task.device]
    model = ORTModelForFeatureExtraction.from_pretrained(folder, export=True, provider=provider)
    processor = ViTImageProcessor.from_pretrained(folder)
    pipe = pipeline(
        "image-feature-extraction", model=model, image_processor=processor, accelerator="ort"
    )
    return _piped(task, pipe)


PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""What ONNX Runtime calls a device."""
WAYS: dict[str, Callable[[Task], Embed]] = {
    "infer embed": ours,
    "timm eager + DataLoader": timm_eager,
    "timm torch.compile + DataLoader": timm_compiled,
    "ONNX Runtime loop, h5py + PIL": onnx_loop,
    "transformers pipeline, PyTorch": transformers_pipeline,
    "optimum pipeline, ONNX Runtime": optimum_pipeline,
}


def _piped(task: Task, pipe: Any) -> Embed:
    def pictures(data: Path) -> Iterable[Any]:
        with _open(data) as file:
            for name in task.ids:
                yield _picture(file, name)

    def embed(data: Path) -> Features:
        with _autocast(task):
            outputs = list(pipe(pictures(data), batch_size=task.batch, return_tensors=True))
        class_tokens = (output[:, 0] for output in outputs)
        return np.concatenate([np.asarray(token.float(), np.float32) for token in class_tokens])

    return embed


def _autocast(task: Task) -> AbstractContextManager[Any]:
    """Return torch's context in which layers compute in the task's precision, float32 as such."""
    import torch  # noqa: PLC0415

    torch.backends.cudnn.allow_tf32 = False  # by default convolutions round float32 to 10 bits
    name = AUTOCAST[task.precision]
    dtype = None if name is None else getattr(torch, name)
    return torch.autocast(task.device, dtype, enabled=dtype is not None)


def _lowered_model(task: Task) -> Any:
    """Return timm's model with weights in the task's precision, and float32 input and output."""
    import torch  # noqa: PLC0415

    name = AUTOCAST[task.precision]
    if name is None:
        return _timm_model(task)
    dtype: torch.dtype = getattr(torch, name)

    class Lowered(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = _timm_model(task).to(dtype)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            features: torch.Tensor = self.model(images.to(dtype)).float()
            return features

    return Lowered().eval()


def _timm_model(task: Task) -> Any:
    import timm  # noqa: PLC0415
    from safetensors.torch import load_file  # noqa: PLC0415

    model = timm.create_model(task.model, **task.options)
    model.load_state_dict(load_file(task.weights))
    return model.eval()


def _hugging_face_model(task: Task) -> str:
    """Writes timm's ViT as transformers' own ViT, with the same weights under its names."""
    import torch  # noqa: PLC0415
    from transformers import ViTConfig, ViTImageProcessor, ViTModel  # noqa: PLC0415

    source = _timm_model(task)
    if type(source).__name__ != "VisionTransformer":
        raise RuntimeError(f"transformers has no model of its own for {task.model}")
    config = ViTConfig(
        hidden_size=source.embed_dim,
        num_hidden_layers=len(source.blocks),
        num_attention_heads=source.blocks[0].attn.num_heads,
        intermediate_size=source.blocks[0].mlp.fc1.out_features,
        image_size=task.size,
        patch_size=source.patch_embed.patch_size[0],
        layer_norm_eps=source.norm.eps,
    )
    model = ViTModel(config, add_pooling_layer=False)
    names = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in source.state_dict().items():
            for target, part in _renamed(name, value):
                names[target].copy_(part)
    folder = str(Path(task.folder) / "transformers")
    model.save_pretrained(folder)
    size = {"height": task.size, "width": task.size}
    ViTImageProcessor(
        size=size, resample=2, image_mean=task.mean, image_std=task.std
    ).save_pretrained(folder)
    return folder


RENAMED = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "blocks": "encoder.layer",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm": "layernorm",
}
"""Parts of a parameter's name in timm's ViT, and in transformers'."""


def _renamed(name: str, value: Any) -> list[tuple[str, Any]]:
    """Returns a parameter of timm's ViT under its names in transformers, which has query, key and value apart."""
    for part, other in RENAMED.items():
        name = ".".join(other if piece == part else piece for piece in _pieces(name, part))
    if "attn.qkv" not in name:
        return [(name, value)]
    kinds = ("query", "key", "value")
    names = [name.replace("attn.qkv", f"attention.attention.{kind}") for kind in kinds]
    return list(zip(names, value.chunk(3), strict=True))


def _pieces(name: str, part: str) -> list[str]:
    """Splits a dotted name so that `part`, where it stands in it as whole words, is one piece."""
    before, found, after = f".{name}.".partition(f".{part}.")
    pieces = [before.strip("."), part, after.strip(".")] if found else [name]
    return [piece for piece in pieces if piece]


def _open(data: Path) -> Any:
    import h5py  # noqa: PLC0415

    return h5py.File(data / FILE)


def _picture(file: Any, name: str) -> Any:
    import PIL.Image  # noqa: PLC0415

    return PIL.Image.open(io.BytesIO(file[name][()])).convert("RGB")


def _batches(task: Task) -> Iterable[Sequence[str]]:
    return (task.ids[at : at + task.batch] for at in range(0, len(task.ids), task.batch))


def main(path: Path) -> None:
    """Opens the way of the task at a path, answers every line with seconds, and leaves the last features beside it."""
    task = Task(**read_json(path))
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries talk; only answers are for the one who asked
    embed = WAYS[task.way](task)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        features = embed(Path(line.strip()))
        seconds = time.perf_counter() - started
        np.save(path.with_suffix(".npy"), features)
        print(seconds, file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
