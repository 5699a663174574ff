"""What a config can switch on: mixing, layer decay, pooling, masks, further datasets; and the guards."""

import json
import subprocess
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import benchmarks.train
from benchmarks.train import TrainRateSettings
from isic.provenance import read_seen
from isic.runtime.errors import UserError
from tests.support.commands import ROOT, TINY, Cli, tiny_settings
from tests.support.datasets import jpeg, small_table, write_hdf5
from train import loop, step
from train.__main__ import train_folds
from train.checkpoint import BEST, LAST, load_checkpoint, save_checkpoint
from train.config import TrainSettings
from train.data import (
    NO_MASK,
    Batch,
    EpochSampler,
    LesionImages,
    Share,
    create_pools,
    fold_loaders,
    load_data,
)
from train.losses import dice, mask_loss
from train.machine import check_bfloat16, default_workers
from train.model import MultiTask, create_model, preprocess_spec
from train.optim import BACKBONE, HEAD, Schedule, create_optimizer
from train.plots import draw_roc
from train.state import TrainState, create_state, restore, save_last

CPU = torch.device("cpu")
SEED_LINES = [
    "--model_config vit_tiny --epochs 5 --batch_size 32 --fold 0 --use_sample",
    "--model_config eva02_base --epochs 20 --batch_size 24 --accumulation_steps 3 --fp16",
    "--config configs/eva02_production.yaml --epochs 10",
    "--model_config vit_tiny --lr 5e-4 --lr_backbone 1e-5",
    "--model_config vit_tiny --augmentation heavy",
    "--model_config vit_tiny --batch_size 16 --accumulation_steps 4",
]


def peak_rates(num_steps: int) -> Schedule:
    return dict.fromkeys((BACKBONE, HEAD), np.ones(num_steps))


def random_batch(size: int, side: int = 32, masks: bool = False) -> Batch:
    random = np.random.default_rng(size)
    images = torch.from_numpy(random.integers(0, 256, (size, side, side, 3), dtype=np.uint8))
    drawn = (
        torch.from_numpy(random.integers(0, 2, (size, side, side), dtype=np.uint8))
        if masks
        else torch.empty(0)
    )
    return Batch(images, torch.arange(size) % 2 * 1.0, torch.arange(size), drawn)


def test_bfloat16_is_refused_on_a_gpu_that_imitates_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU is pretended, because this machine has none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    settings = tiny_settings(bf16=True, output_dir=tmp_path / "outputs", data=tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    words = r"^--bf16: bfloat16 takes a GPU of .*8\.0 .*, and Tesla T4 has 7\.5; use --fp16$"
    with pytest.raises(UserError, match=words):
        train_folds(settings)
    rate = TrainRateSettings(**settings.model_dump())
    with pytest.raises(UserError, match=words):
        benchmarks.train.train(rate)
    assert not settings.output_dir.exists()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    check_bfloat16(torch.device("cuda", 0))
    check_bfloat16(CPU)


# --- command lines


@pytest.mark.parametrize("line", SEED_LINES)
def test_the_documented_command_lines_run(
    line: str, small_dataset: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As written, on a tiny network, and with the epochs cut to two."""
    monkeypatch.chdir(ROOT)
    small = [*TINY, "--data", small_dataset, "--output_dir", tmp_path, "--fold", 0, "--epochs", 2]
    ended = cli("train", *line.split(), *small)
    assert ended.code == 0, ended.err
    config = (tmp_path / "tiny" / "fold_0" / "config.yaml").read_text()
    words = line.split()
    for key in ("batch_size", "accumulation_steps", "augmentation"):
        if f"--{key}" in words:
            assert f"{key}: {words[words.index(f'--{key}') + 1]}\n" in config


@pytest.mark.parametrize(
    "flags",
    [
        ["--mixup", "0.4", "--cutmix", "1.0", "--batch_size", "8"],
        ["--layer_decay", "0.7", "--grad_checkpointing", "true", "--global_pool", "avg"],
        [
            "--model",
            "test_convnext",
            "--image_size",
            "64",
            "--global_pool",
            "avgmax",
            "--drop_path_rate",
            "0.1",
        ],
    ],
)
def test_what_can_be_switched_on_trains(
    flags: list[str], small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    fixed = ["--data", small_dataset, "--output_dir", tmp_path, "--fold", 0, "--epochs", 2]
    ended = cli("train", *TINY, *fixed, *flags)
    assert ended.code == 0, ended.err


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mixup": 0.2, "batch_size": 7}, "make --batch_size 7 even"),
        ({"cutmix": 0.2, "mask_weight": 1.0}, "not their masks"),
    ],
)
def test_settings_that_exclude_each_other(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_settings(**values)


def test_a_pooling_that_the_backbone_lacks_is_one_sentence() -> None:
    with pytest.raises(UserError, match="test_convnext does not pool by token"):
        create_model(tiny_settings(model="test_convnext", image_size=64, global_pool="token"))


def test_layer_decay_falls_towards_the_input_and_leaves_the_head_alone() -> None:
    settings = tiny_settings(layer_decay=0.5, lr=1e-2, lr_backbone=1e-3)
    model = create_model(settings)
    rate = {
        id(weight): group["lr"]
        for group in create_optimizer(model, settings).param_groups
        for weight in group["params"]
    }
    blocks = [rate[id(block.mlp.fc1.weight)] for block in model.backbone.blocks]  # type: ignore[union-attr, attr-defined]
    assert np.allclose(np.divide(blocks[1:], blocks[:-1]), 2) and max(blocks) <= 1e-3
    assert {rate[id(weight)] for weight in model.head.parameters()} == {1e-2}
    assert rate.keys() == {id(weight) for weight in model.parameters()}


def test_mixing_mixes_images_and_targets_alike() -> None:
    np.random.seed(0)  # noqa: NPY002 - timm's Mixup draws here
    target = torch.tensor([0.0, 1.0, 0.0, 0.0])
    images = (target * 200).to(torch.uint8).view(4, 1, 1, 1).expand(4, 32, 32, 3)
    mixed = loop.create_mixup(tiny_settings(mixup=1.0, cutmix=1.0))(
        Batch(images, target, torch.arange(4))
    )
    assert mixed.images.shape == images.shape and 0 < mixed.target[1] < 1
    torch.testing.assert_close(
        mixed.images.mean(dim=(1, 2, 3)) / 200, mixed.target, atol=0.01, rtol=0
    )


# --- half precision


@pytest.mark.parametrize("values", [{"bf16": True}, {"fp16": True}])
def test_logits_keep_float32_resolution_under_autocast(values: dict[str, object]) -> None:
    settings = tiny_settings(**values)
    state = create_state(settings, CPU, 0)
    held = loop.predict(state, [random_batch(500)], settings, CPU)
    half = torch.float16 if settings.fp16 else torch.bfloat16
    logits = torch.from_numpy(held.logits)
    assert logits.dtype == torch.float32 and len(logits.unique()) > 450
    assert (logits.to(half) == logits).float().mean() < 0.05
    images = random_batch(8).images
    with step.autocast(settings, CPU):
        features, logits, *_ = state.model(images)
    assert torch.equal(logits, state.model.head(features))
    assert not torch.equal(features, state.model(images)[0]), "the backbone in half precision"


@pytest.mark.parametrize("values", [{}, {"mask_weight": 1.0}])
def test_an_exported_graph_knows_of_no_autocast(values: dict[str, float]) -> None:
    model = create_model(tiny_settings(**values)).eval()
    program = torch.export.export(model, (random_batch(2).images,), strict=False)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.linear.default" in names
    assert not any("autocast" in name or "wrap" in name for name in names), names


# --- shares of an epoch


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "world_size"), [(100, 8, 2), (61, 4, 3), (10, 8, 2)]
)
def test_shares_make_up_the_batches_of_one_process(
    num_rows: int, batch_size: int, world_size: int
) -> None:
    rows = np.arange(num_rows)
    pools = create_pools(rows, (rows % 3 == 0).astype(np.float32), repeats=1, per_positive=None)
    epoch = EpochSampler(pools, seed=42, epoch=3)
    whole = list(Share(epoch, batch_size * world_size, 0, 1))
    shares = [list(Share(epoch, batch_size, rank, world_size)) for rank in range(world_size)]
    assert [len(share) for share in shares] == [
        len(Share(epoch, batch_size, r, world_size)) for r in range(world_size)
    ]
    drawn = [key for share in shares for key in share]
    assert sorted(drawn) == sorted(whole) and len(set(drawn)) == len(drawn)
    for at in range(0, len(shares[0]), batch_size):
        batch = [key for share in shares for key in share[at : at + batch_size]]
        assert sorted(batch) == sorted(whole[at * world_size : (at + batch_size) * world_size])


def test_a_gpu_gets_the_cores_and_its_processes_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_workers(CPU) == 0
    cores = default_workers(torch.device("cuda"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert default_workers(torch.device("cuda")) == max(1, cores // 2)


# --- masks


def test_images_without_a_mask_add_nothing_to_the_loss() -> None:
    logits = torch.randn(4, 16, 16, requires_grad=True)
    masks = torch.randint(0, 2, (4, 32, 32), dtype=torch.uint8)
    masks[2:] = NO_MASK
    loss = mask_loss(logits, masks)
    torch.testing.assert_close(loss, mask_loss(logits[:2], masks[:2]))
    loss.backward()
    assert (
        logits.grad is not None
        and logits.grad[:2].abs().sum() > 0
        and logits.grad[2:].abs().sum() == 0
    )
    assert mask_loss(logits, torch.full_like(masks, NO_MASK)) == 0


def test_dice_is_its_formula() -> None:
    masks = torch.zeros(4, 4, 4, dtype=torch.uint8)
    masks[0, :2] = masks[1, :2] = 1
    masks[3] = NO_MASK
    drawn = torch.zeros(4, 4, 4)
    drawn[0, :2], drawn[1, 1:3] = 1, 1
    expected = torch.tensor([1.0, 0.5, 1.0, torch.nan])
    torch.testing.assert_close(dice(drawn, masks), expected, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "size", "stride"),
    [("test_vit", 32, 2), ("test_efficientnet", 64, 2), ("eva02_tiny_patch14_224", 56, 2)],
)
def test_a_mask_comes_third_and_the_rest_stays(name: str, size: int, stride: int) -> None:
    model = create_model(tiny_settings(model=name, image_size=size, mask_weight=1.0)).eval()
    assert isinstance(model, MultiTask) and model.mask_stride == stride
    images = random_batch(2, size).images
    with torch.inference_mode():
        features, logits, mask = model(images)
        torch.testing.assert_close(features, model.backbone(model.normalised(images)))
    assert logits.shape == (2, 1) and mask.shape == (2, size // stride, size // stride)
    assert mask.min() >= 0 and mask.max() <= 1


def test_masks_are_augmented_with_their_images(small_dataset: Path, tmp_path: Path) -> None:
    """The mask of an image that is bright in one corner is bright where the augmented image is."""
    from train.augment import create_augmentation

    image = np.full((32, 32, 3), 20, np.uint8)
    image[:12, :9] = 220
    import cv2

    png = cv2.imencode(".png", image)[1].tobytes()
    write_hdf5(small_dataset / "train-image.hdf5", dict.fromkeys(small_table()["isic_id"], png))
    mask = cv2.imencode(".png", (image > 100).astype(np.uint8)[..., 0] * 255)[1].tobytes()
    write_hdf5(small_dataset / "masks.hdf5", dict.fromkeys(small_table()["isic_id"][:30], mask))
    settings = tiny_settings(data=small_dataset, output_dir=tmp_path, mask_weight=1.0)
    images = LesionImages(
        load_data(settings), preprocess_spec(settings), create_augmentation("light")
    )
    for seed in range(8):
        pixels, _, _, drawn = images[3, seed]
        assert ((pixels[..., 0] > 110) == drawn).mean() > 0.99
    assert (images[40, 0][3] == NO_MASK).all(), "an image without a mask"


def test_masks_are_learnt_scored_and_exported(
    synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = [
        "--config",
        "multitask_demo",
        "--name",
        "mt",
        "--data",
        synth_dataset,
        "--output_dir",
        tmp_path,
    ]
    ended = cli("train", *flags, "--num_workers", 0, "--fold", 0, "--epochs", 3, "--num_folds", 3)
    assert ended.code == 0, ended.err
    assert "Dice 0." in ended.out
    fold = tmp_path / "mt" / "fold_0"
    last = json.loads((fold / "history.jsonl").read_text().splitlines()[-1])
    assert last["dice"] == pytest.approx(pl.read_parquet(fold / "oof.parquet")["dice"].mean())
    ended = cli("export", "--config", "mt", "--model_dir", tmp_path / "mt")
    assert ended.code == 0, ended.out + ended.err
    manifest = json.loads((fold / "model.onnx.json").read_text())
    assert manifest["mask_stride"] == 2 and manifest["parity"]["batch_2"]["max_mask_error"] < 1e-3


def mask_png(width: int, height: int, value: int = 255) -> bytes:
    import cv2

    return bytes(cv2.imencode(".png", np.full((height, width), value, np.uint8))[1])


def test_masks_that_may_be_wrong_are_warned_of(
    small_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = small_table()["isic_id"].to_list()
    masks = {name: mask_png(40 + row % 30, 40 + row % 30) for row, name in enumerate(ids[:50])}
    write_hdf5(
        small_dataset / "masks.hdf5", masks | {ids[3]: mask_png(9, 7), "isic_55": mask_png(9, 9)}
    )
    load_data(tiny_settings(data=small_dataset, output_dir=tmp_path, mask_weight=1.0))
    stretched, unmatched = capsys.readouterr().err.splitlines()
    assert stretched.startswith("warning: ") and stretched.endswith(
        f"1 masks have another size than their image and are stretched to it, the first is {ids[3]} "
        "(mask 9 x 7, image 43 x 43)"
    )
    assert unmatched.endswith(
        "1 masks belong to no training row, the first is isic_55; 10 training images have no mask"
    )


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (mask_png(42, 42, value=1), "its brightest red value is 1; in the lesion it must be 255"),
        (mask_png(42, 42)[:50], "truncated PNG"),
        (
            np.ones((42, 42), bool),
            "an array of 42 x 42 values, not the bytes of a JPEG or PNG file",
        ),
        (h5py.SoftLink("/gone"), "a link to /gone, which cannot be opened"),
    ],
)
def test_a_mask_that_cannot_be_used_is_refused(
    small_dataset: Path, tmp_path: Path, mask: object, words: str
) -> None:
    write_hdf5(small_dataset / "masks.hdf5", {"ISIC_0000001": mask_png(41, 41)})
    with h5py.File(small_dataset / "masks.hdf5", "a") as file:
        file["ISIC_0000002"] = np.bytes_(mask) if isinstance(mask, bytes) else mask
    with pytest.raises(UserError) as caught:
        load_data(tiny_settings(data=small_dataset, output_dir=tmp_path, mask_weight=1.0))
    assert f"1 masks cannot be used, the first is ISIC_0000002 ({words}); fix" in str(caught.value)


def test_a_dataset_without_masks_is_refused(small_dataset: Path, tmp_path: Path, cli: Cli) -> None:
    ended = cli(
        "train", *TINY, "--data", small_dataset, "--output_dir", tmp_path, "--mask_weight", 1
    )
    assert (
        ended.code == 2
        and "has no mask of any training image" in ended.err
        and ended.err.count("\n") == 1
    )


# --- further datasets


def test_extra_rows_are_trained_on_and_never_validated_on(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    extra = tmp_path / "extra"
    extra.mkdir()
    table = pl.DataFrame(
        {"isic_id": ["OLD_1", "OLD_2", "OLD_3", "ISIC_0000001"], "target": [1, 0, 1, 0]}
    )
    table = table.with_columns(patient_id=pl.Series([None, None, "IP_0000003", None]))
    table.write_csv(extra / "train-metadata.csv")
    write_hdf5(extra / "train-image.hdf5", {name: jpeg(40) for name in table["isic_id"]})
    flags = ["--data", small_dataset, "--output_dir", tmp_path, "--epochs", 1, "--num_folds", 3]
    ended = cli("train", *TINY, *flags, "--extra_data", extra, "--extra_weight", 2.5)
    assert ended.code == 0, ended.err
    assert "2 rows are left out, their image or patient stands in another dataset" in ended.out
    scored = pl.concat(
        [pl.read_parquet(tmp_path / "tiny" / f"fold_{k}" / "oof.parquet") for k in range(3)]
    )
    assert sorted(scored["isic_id"]) == sorted(small_table()["isic_id"])
    data = load_data(
        tiny_settings(
            data=small_dataset, output_dir=tmp_path, name="tiny", num_folds=3, extra_data=[extra]
        )
    )
    assert (
        data.table["isic_id"].to_list()[60:] == ["OLD_1", "OLD_2"] and (data.fold[60:] == -1).all()
    )
    seen = read_seen(tmp_path / "tiny" / "fold_1" / "trained_on.parquet")
    learned_from = data.table.filter(pl.Series(data.fold != 1))
    assert sorted(seen["isic_id"]) == sorted(learned_from["isic_id"]), "the extra rows too"


def test_further_rows_that_are_all_known_are_none(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = ["--data", small_dataset, "--output_dir", tmp_path, "--epochs", 1, "--fold", 0]
    ended = cli("train", *TINY, *flags, "--extra_data", small_dataset)
    assert ended.code == 0 and "60 rows are left out" in ended.out, ended.err


@pytest.mark.parametrize("weight", [0.5, 1.0, 2.5])
def test_extra_weight_scales_what_an_epoch_shows_of_both_classes(weight: float) -> None:
    rows, target = np.arange(40), (np.arange(40) % 4 == 0).astype(np.float32)
    positives, negatives = create_pools(rows, target, repeats=2, per_positive=2, weight=weight)
    drawn = [row for row, _ in EpochSampler([positives, negatives], seed=1)]
    shown = [row for row in drawn if row % 4 == 0]
    assert len(shown) == round(2 * weight * 10) and len(drawn) - len(shown) == round(weight * 20)
    counts = [shown.count(row) for row in range(0, 40, 4)]
    assert max(counts) - min(counts) <= 1, "each positive equally often, but for a remainder"


def write_extra(folder: Path, targets: list[int]) -> Path:
    """A further dataset whose images are grey; ids name the folder."""
    folder.mkdir()
    ids = [f"{folder.name}_{row}" for row in range(len(targets))]
    pl.DataFrame({"isic_id": ids, "target": targets}).write_csv(folder / "train-metadata.csv")
    write_hdf5(folder / "train-image.hdf5", {name: jpeg(20, 120) for name in ids})
    return folder


def test_every_extra_dataset_keeps_the_ratio_of_classes(
    small_dataset: Path, tmp_path: Path
) -> None:
    extras = [
        write_extra(tmp_path / "few", [1] * 2 + [0] * 50),
        write_extra(tmp_path / "many", [1] * 10 + [0] * 90),
    ]
    settings = tiny_settings(
        data=small_dataset,
        output_dir=tmp_path,
        extra_data=extras,
        negatives_per_positive=1.5,
        positive_repeats=2,
        extra_weight=2,
    )
    data = load_data(settings)
    _, sampler, _ = fold_loaders(data, 0, preprocess_spec(settings), settings)
    own = np.flatnonzero(data.fold > 0)
    epochs = []
    for sampler.epoch in (0, 1, 0):
        epochs.append(np.array([row for row, _ in sampler]))
        for number, num_positives in ((0, int(data.target[own].sum())), (1, 2), (2, 10)):
            rows = epochs[-1][data.source[epochs[-1]] == number]
            weight = 2 if number else 1
            assert (data.target[rows] == 1).sum() == 2 * weight * num_positives
            assert (data.target[rows] == 0).sum() == 1.5 * weight * num_positives
    assert np.array_equal(epochs[0], epochs[2])
    few = [set(rows[(data.source[rows] == 1) & (data.target[rows] == 0)]) for rows in epochs]
    assert len(few[0]) == 6 and few[0] != few[1], "negatives are redrawn"


def test_an_epoch_of_mostly_extra_rows_is_warned_of(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    extra = write_extra(tmp_path / "more", [1, 0] * 60)
    flags = [*TINY, "--data", small_dataset, "--epochs", 1, "--fold", 0, "--extra_data", extra]
    ended = cli("train", *flags, "--output_dir", tmp_path / "one")
    assert ended.code == 0, ended.err
    assert "fold 0: an epoch shows 16 positives and 32 negatives; of --extra_data" in ended.out
    assert "60 positives and 60 negatives (71%)" in ended.out
    warning = "warning: 71% of the rows of an epoch are of --extra_data; a lower --extra_weight"
    assert warning in ended.err
    ended = cli("train", *flags, "--output_dir", tmp_path / "two", "--extra_weight", 0.2)
    assert "12 positives and 12 negatives (33%)" in ended.out and "warning" not in ended.err


@pytest.mark.parametrize("target", [0, 1])
def test_an_extra_dataset_of_one_class_is_warned_of_or_refused(
    target: int, small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    extra = write_extra(tmp_path / "single", [target] * 8)
    flags = [*TINY, "--data", small_dataset, "--epochs", 1, "--fold", 0, "--extra_data", extra]
    ended = cli("train", *flags, "--output_dir", tmp_path / "one")
    assert ended.code == 0 and f"the target of all 8 rows is {target}; the network" in ended.err
    ended = cli("train", *flags, "--output_dir", tmp_path / "two", "--negatives_per_positive", 3)
    if target:
        assert ended.code == 0 and "of --extra_data 8 positives and 0 negatives" in ended.out
    else:
        assert ended.code == 2 and not (tmp_path / "two").exists()
        assert "none of the 8 rows is positive" in ended.err and ended.err.count("\n") == 1


# --- the device is never asked for a value


class Asked(TorchDispatchMode):
    """Collects the operations that hand the host a value, for which a GPU would have to finish all its work."""

    ASKING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.names = list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.ASKING:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_what_asks_the_device_is_noticed() -> None:
    with Asked() as asked:
        torch.ones(2).sum().item()
    assert len(asked.names) == 1


@pytest.mark.parametrize(
    "values",
    [
        {"ema_decay": 0.9, "accumulation_steps": 2},
        {"fp16": True, "mask_weight": 1.0},
        {
            "bf16": True,
            "mixup": 0.4,
            "cutmix": 0.4,
            "model": "test_efficientnet",
            "drop_path_rate": 0.1,
        },
    ],
)
def test_a_step_asks_the_device_for_nothing(values: dict[str, object]) -> None:
    settings = tiny_settings(**values)
    state = create_state(settings, CPU, 0)
    mix = loop.create_mixup(settings)
    with Asked() as asked:
        for _ in range(2):
            batches = [mix(loop.to_device(random_batch(8, masks=settings.mask_weight > 0), CPU))]
            loss = step.accumulate(state, state.model, batches, settings, CPU)
            step.optimizer_step(state, settings, loss)
    assert asked.names == []


# --- guards


class OutOfMemory(nn.Module):
    """Stands in for a GPU, which this machine may lack: it holds no more than `limit` images."""

    def __init__(self, model: nn.Module, limit: int) -> None:
        super().__init__()
        self.model, self.limit, self.sizes = model, limit, list[int]()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if len(images) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.sizes.append(len(images))
        outputs: tuple[torch.Tensor, ...] = self.model(images)
        return outputs


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = []
    for limit in (16, 5):
        state = create_state(tiny_settings(batch_size=16), CPU, 0)
        forward = OutOfMemory(state.model, limit)
        loop.train_epoch(
            state,
            forward,
            [random_batch(16)] * 2,
            peak_rates(2),
            tiny_settings(batch_size=16),
            CPU,
            "",
        )
        weights.append(torch.cat([weight.detach().ravel() for weight in state.model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=2e-5, rtol=1e-3)
    assert forward.sizes == [4] * 8 and state.step == 2
    assert "micro-batches of 4 instead, 4 times as many a step" in capsys.readouterr().out


def test_an_image_that_does_not_fit_is_one_sentence() -> None:
    state = create_state(tiny_settings(), CPU, 0)
    with pytest.raises(UserError, match="does not hold 1 images; use a smaller"):
        step.accumulate(state, OutOfMemory(state.model, 0), [random_batch(4)], tiny_settings(), CPU)


def test_images_that_break_the_gradient_are_named(
    small_dataset: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(logits: torch.Tensor, target: torch.Tensor, settings: TrainSettings) -> torch.Tensor:
        return logits.sum() * torch.nan

    monkeypatch.setattr("train.step.focal_loss", broken)
    flags = [*TINY, "--data", small_dataset, "--output_dir", tmp_path, "--fold", 0, "--epochs", 1]
    for precision in ("--bf16", "--fp16"):
        ended = cli(
            "train", *flags, precision, "--force", "--batch_size", 4, "--positive_repeats", 9
        )
        assert (
            ended.code == 2
            and "not finite" in ended.err
            and "on the images ISIC_00000" in ended.err
        )
    assert load_checkpoint(tmp_path / "tiny" / "fold_0" / LAST)["epoch"] == 0


def test_a_full_disk_leaves_the_last_checkpoint_readable(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount the small disk that this fills")
    values = dict.fromkeys(
        ("model_state_dict", "optimizer_state_dict", "best_pauc", "epoch", "config", "args"), 0
    )
    try:
        save_checkpoint(disk / LAST, **values, weights=torch.ones(100_000))
        with pytest.raises(UserError, match=r"the disk is full, so .*last\.pth was not written"):
            save_checkpoint(disk / LAST, **values, weights=torch.zeros(400_000))
        assert load_checkpoint(disk / LAST)["weights"].sum() == 100_000
        assert [path.name for path in disk.iterdir()] == [LAST]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_restored_state_learns_on_to_the_same_bits(small_dataset: Path, tmp_path: Path) -> None:
    """With what a transformer in float32 lacks: batch statistics, channels-last weights, and a loss scale that fell."""
    settings = tiny_settings(
        model="test_efficientnet",
        data=small_dataset,
        output_dir=tmp_path,
        fp16=True,
        ema_decay=0.9,
        accumulation_steps=2,
    )
    data = load_data(settings)

    def learn(state: TrainState, num_batches: int, broken: float = 1.0) -> None:
        batches = [
            random_batch(8)._replace(target=torch.full((8,), broken)) for _ in range(num_batches)
        ]
        torch.manual_seed(state.step)
        loop.train_epoch(state, state.model, batches, peak_rates(99), settings, CPU, "")

    state, restored = create_state(settings, CPU, 0), create_state(settings, CPU, 1)
    learn(state, 3)
    learn(state, 1, broken=torch.nan)
    save_last(tmp_path / LAST, state, settings, data)
    restore(restored, tmp_path / LAST, settings, data)
    ends = []
    for each in (state, restored):
        learn(each, 5)
        moments = [value for entry in each.optimizer.state.values() for value in entry.values()]
        ends.append(
            [*each.model.state_dict().values(), *each.evaluated.state_dict().values(), *moments]
        )
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))
    assert (
        state.scaler.state_dict() == restored.scaler.state_dict()
        and state.scaler.get_scale() == 65536 / 2
    )


# --- what people look at, and weights for others


def test_the_backbone_loads_in_timm_alone(trained: Path) -> None:
    folder = trained / "fold_0" / "backbone"
    backbone = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    settings = tiny_settings()
    model = create_model(settings, pretrained=False).eval()
    model.load_state_dict(load_checkpoint(trained / "fold_0" / BEST)["model_state_dict"])
    images = random_batch(3).images
    with torch.inference_mode():
        torch.testing.assert_close(backbone(model.normalised(images)), model(images)[0])
    assert tuple(backbone.pretrained_cfg["mean"]) == preprocess_spec(settings).mean
    again = create_model(tiny_settings(pretrained=str(folder)))
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.backbone.parameters(), backbone.parameters(), strict=True)
    )
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n") and "was held out" in card


def test_roc_curves_are_drawn(trained: Path, tmp_path: Path) -> None:
    assert "pooled: pAUC" in (trained / "roc.svg").read_text()
    oof = pl.read_parquet(trained / "fold_0" / "oof.parquet")
    draw_roc(tmp_path / "one.svg", {"fold 0": oof})
    assert ">fold 0: pAUC" in (tmp_path / "one.svg").read_text()


def test_scalars_reach_tensorboard(trained: Path) -> None:
    pytest.importorskip("tensorboard")
    assert list((trained / "fold_0" / "tensorboard").glob("events.out.tfevents.*"))
