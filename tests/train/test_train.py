import contextlib
import json
from pathlib import Path

import h5py
import numpy as np
import polars as pl
import pytest
import timm
import torch
from safetensors.torch import save_file

from isic.folds import read_folds
from isic.metrics import pauc
from isic.runtime.errors import UserError
from isic.runtime.files import read_manifest
from tests.support.commands import TINY, Cli, tiny_settings
from tests.support.datasets import jpeg, small_table, write_hdf5
from train.augment import LEVELS, create_augmentation
from train.checkpoint import BEST, KEYS, load_checkpoint, save_checkpoint
from train.config import TrainSettings, load_settings
from train.data import Batch, EpochSampler, LesionImages, create_pools, load_data, sample_rows
from train.loop import batched, score, train_epoch
from train.losses import focal_loss
from train.model import create_model, preprocess_spec
from train.optim import (
    BACKBONE,
    HEAD,
    Schedule,
    create_optimizer,
    create_schedule,
    learning_rates,
    lr_schedule,
    set_lr,
)
from train.outputs import Predictions, last_epoch, read_history
from train.state import create_state, restore, save_last
from train.step import NotFinite

CONFIGS = Path(__file__).parents[2] / "configs"
PRETRAINED_CONFIGS = {path.stem for path in CONFIGS.glob("*.yaml")} - {
    "demo",
    "multitask_demo",
    "scratch",
}
FEATURES = {
    "convnext_tiny": 768,
    "convnext_base": 1024,
    "convnextv2_nano": 640,
    "eva02_small_336": 384,
    "vit_tiny": 192,
    "vit_small": 384,
    "vit_base": 768,
    "eva02_small": 384,
    "eva02_base": 768,
    "eva02_production": 768,
}


def peak_rates(num_steps: int) -> Schedule:
    return dict.fromkeys((BACKBONE, HEAD), np.ones(num_steps))


# --- what a run leaves behind


def test_a_fold_leaves_the_files_of_the_contract(trained: Path, synth_dataset: Path) -> None:
    names = {path.name for path in (trained / "fold_0").iterdir()}
    assert names >= {
        BEST,
        BEST + ".json",
        "last.pth",
        "history.jsonl",
        "oof.parquet",
        "config.yaml",
    }
    checkpoint = torch.load(trained / "fold_0" / BEST, weights_only=True)
    assert set(KEYS) == set(checkpoint)
    manifest = read_manifest(trained / "fold_0" / BEST)
    assert manifest["folds_digest"] == read_folds(trained / "folds.parquet").digest
    history = [
        json.loads(line) for line in (trained / "fold_0" / "history.jsonl").read_text().splitlines()
    ]
    assert [entry["epoch"] for entry in history] == [1]
    assert {"loss", "pauc", "auc", "images_per_second", "waiting_share"} <= set(history[0])


def test_every_row_is_held_out_once_and_scored_by_the_saved_weights(
    trained: Path, synth_dataset: Path
) -> None:
    settings = tiny_settings(
        data=synth_dataset, output_dir=trained.parent, name="tiny", num_folds=3
    )
    data = load_data(settings)
    oof = pl.concat([pl.read_parquet(trained / f"fold_{k}" / "oof.parquet") for k in range(3)])
    assert sorted(oof["isic_id"]) == sorted(data.table["isic_id"])
    assert (read_folds(trained / "folds.parquet").of(oof) == oof["fold"]).all()

    checkpoint = load_checkpoint(trained / "fold_1" / BEST)
    model = create_model(settings, pretrained=False)
    model.load_state_dict(checkpoint["model_state_dict"])
    images = LesionImages(data, preprocess_spec(settings))
    rows = np.flatnonzero(data.fold == 1)[:5]
    pixels = torch.from_numpy(np.stack([images[int(row), 0][0] for row in rows]))
    with torch.inference_mode():
        logits = model.eval()(pixels)[1].squeeze(1).numpy()
    saved = (
        oof.filter(pl.col("isic_id").is_in(data.table["isic_id"][rows].implode()))
        .sort("isic_id")["logit"]
        .to_numpy()
    )
    order = np.argsort(data.table["isic_id"][rows].to_numpy())
    np.testing.assert_allclose(logits[order], saved, atol=1e-5)
    assert checkpoint["best_pauc"] == pauc(
        *(oof.filter(pl.col("fold") == 1)[name] for name in ("target", "logit"))
    )


def test_finished_folds_are_skipped_and_other_settings_refused(
    trained: Path, synth_dataset: Path, cli: Cli
) -> None:
    flags = [*TINY, "--data", synth_dataset, "--output_dir", trained.parent, "--num_folds", 3]
    before = (trained / "fold_0" / BEST).stat().st_mtime_ns
    ended = cli("train", *flags, "--epochs", 1)
    assert ended.code == 0 and "fold 2 is finished" in ended.out and "pooled" in ended.out
    assert (trained / "fold_0" / BEST).stat().st_mtime_ns == before
    ended = cli("train", *flags, "--epochs", 2)
    assert ended.code == 2 and "epochs=1, now it is 2" in ended.err


def test_a_folder_of_something_else_is_not_trained_into(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = [*TINY, "--data", small_dataset, "--output_dir", tmp_path, "--epochs", 1, "--fold", 0]
    for place in ("tiny/roc.svg", "tiny/fold_0/oof.parquet", "tiny/fold_0/config.yaml"):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine: 1")
        ended = cli("train", *flags, "--force")
        assert ended.code == 2 and f"{place} exists and was not written by this" in ended.err
        assert path.read_text() == "mine: 1"
        path.unlink()
    ended = cli("train", *flags, "--output_dir", small_dataset.parent, "--name", small_dataset.name)
    assert ended.code == 2 and "holds a dataset" in ended.err
    assert not (small_dataset / "folds.parquet").exists()


@pytest.mark.parametrize("text", ["", "half\n", "[1]\n", '{"loss": 1}\n'])
def test_a_history_that_is_none_is_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "history.jsonl").write_text(text)
    if not text:
        assert last_epoch(read_history(tmp_path / "history.jsonl")) == 0
        return
    with pytest.raises(UserError, match=r"history\.jsonl"):
        read_history(tmp_path / "history.jsonl")


def test_epochs_are_not_thrown_away_unasked(small_dataset: Path, tmp_path: Path, cli: Cli) -> None:
    flags = [*TINY, "--data", small_dataset, "--output_dir", tmp_path, "--epochs", 1, "--fold", 0]
    folder = tmp_path / "tiny" / "fold_0"
    assert cli("train", *flags).code == 0
    (folder / "oof.parquet").write_bytes(b"half")
    ended = cli("train", *flags)
    assert ended.code == 2 and "oof.parquet is not a Parquet file" in ended.err
    assert "--force" not in ended.err, "the checkpoint is whole"
    (folder / "oof.parquet").unlink()
    ended = cli("train", *flags)
    assert (
        ended.code == 2
        and "holds 1 of 1 epochs; go on with --resume, or start again with --force" in ended.err
    )
    assert cli("train", *flags, "--force").code == 0
    (folder / "config.yaml").write_text("name: tiny")
    ended = cli("train", *flags)
    assert ended.code == 2 and "config.yaml lacks model or epochs" in ended.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--extra_data", "nowhere"], "nowhere"),
        (
            ["--image_size", "30"],
            "test_vit does not take images of 30 px (Input height (30) should be divisible by patch size (16)); "
            "--image_size 32 fits, the size of its own config is 160",
        ),
        (
            ["--model", "efficientformer_l1", "--image_size", "128"],
            "efficientformer_l1 does not take images of 128 px",
        ),
        (["--model", "test_vit.r160_in1kk"], "known tags are: r160_in1k"),
        (["--mask_weight", "1"], "has no mask"),
        (["--pretrained", "nowhere.safetensors"], "no weights at"),
        (["--epochs"], "--epochs needs a value"),
        (["--name", ""], "--name"),
    ],
)
def test_what_is_refused_has_changed_nothing(
    small_dataset: Path, tmp_path: Path, cli: Cli, flags: list[str], words: str
) -> None:
    ended = cli("train", *TINY, "--data", small_dataset, "--output_dir", tmp_path / "out", *flags)
    assert ended.code == 2 and words in ended.err and not (tmp_path / "out").exists(), ended.err


@pytest.mark.parametrize(
    "name",
    [
        "test_mambaout",
        "mobilenetv3_small_050",
        "repghostnet_050",
        "xcit_nano_12_p16_224",
        "test_resnet",
    ],
)
def test_backbones_of_many_kinds(name: str) -> None:
    """Whose head has a width of its own, that know no stochastic depth, or whose patch is a number."""
    model = create_model(tiny_settings(model=name, image_size=64)).eval()
    with torch.inference_mode():
        features, logits = model(torch.zeros(2, 64, 64, 3, dtype=torch.uint8))
    assert features.shape == (2, model.num_features) and logits.shape == (2, 1)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"model": "repghostnet_050", "drop_path_rate": 0.1},
            "repghostnet_050 has no stochastic depth; set --drop_path_rate 0",
        ),
        (
            {"model": "crossvit_tiny_240"},
            r"crossvit_tiny_240 does not take images of 64 px \(.*\); --image_size 240 fits",
        ),
        ({"model": "test_maxvit", "image_size": 100}, "does not take images of 100 px .*divisible"),
        (
            {"model": "test_vit", "image_size": 40},
            r"divisible by patch size \(16\)\); --image_size 32",
        ),
        ({"model": "test_convnext", "global_pool": "token"}, "does not pool by token"),
        ({"model": "test_vit_relpos", "global_pool": "max"}, "does not pool by max"),
        (
            {"model": "crossvit_tiny_240", "image_size": 240, "mask_weight": 1},
            "no feature maps that masks can be drawn from",
        ),
        (
            {"model": "test_convnext", "image_size": 80, "mask_weight": 1},
            "test_convnext does not draw masks of images of 80 px .*; --image_size 64 fits",
        ),
        ({"model": "dla34", "grad_checkpointing": True}, "cannot recompute activations"),
        (
            {"model": "test_resnet", "image_size": 32, "batch_size": 1},
            "one image of 32 px at a time",
        ),
        (
            {"model": "convnext_tiny_in22ft1k"},
            'timm calls "convnext_tiny_in22ft1k" "convnext_tiny.fb_in22k_ft_in1k" now',
        ),
        (
            {"model": "test_vit.r160_in1kk", "pretrained": True},
            r"no weights .* known tags are: r160_in1k; --model test_vit takes the default",
        ),
    ],
)
def test_a_backbone_that_does_not_fit_is_refused_for_the_true_reason(
    values: dict[str, object], words: str
) -> None:
    with pytest.raises(UserError, match=words) as refused:
        create_model(tiny_settings(**{"image_size": 64, **values}))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("model", "size"), [("pvt_v2_b0", 64), ("lambda_resnet26t", 256), ("test_vit.r160_in1k", 32)]
)
def test_a_backbone_that_fits_learns(model: str, size: int) -> None:
    """A patch that is no kernel, weights of five dimensions, and a tag."""
    settings = tiny_settings(model=model, image_size=size)
    state = create_state(settings, torch.device("cpu"), 0)
    batch = Batch(torch.zeros(2, size, size, 3, dtype=torch.uint8), torch.ones(2), torch.arange(2))
    train_epoch(state, state.model, [batch], peak_rates(1), settings, torch.device("cpu"), "fold 0")


@pytest.mark.parametrize("model", ["test_vit", "test_vit2"])
def test_weights_that_do_not_fill_the_backbone_are_refused(tmp_path: Path, model: str) -> None:
    """A checkpoint of ours, whose names begin with `backbone.`, and another architecture's weights: timm takes both."""
    torch.save(
        {"model_state_dict": create_model(tiny_settings()).state_dict()},
        tmp_path / "best_model.pth",
    )
    save_file(
        timm.create_model("test_efficientnet", num_classes=0).state_dict(),
        tmp_path / "other.safetensors",
    )
    for name in ("best_model.pth", "other.safetensors"):
        with pytest.raises(UserError, match=rf"fills 0 of the \d+ weight matrices of {model}"):
            create_model(tiny_settings(model=model, pretrained=str(tmp_path / name)))


def test_it_learns_what_can_be_learnt(small_dataset: Path, tmp_path: Path, cli: Cli) -> None:
    """Malignant images are dark here: a model that learns at all gets them right."""
    flags = [
        "--data",
        small_dataset,
        "--output_dir",
        tmp_path,
        "--fold",
        0,
        "--epochs",
        12,
        "--batch_size",
        16,
    ]
    ended = cli(
        "train",
        *TINY,
        *flags,
        "--lr",
        3e-3,
        "--lr_backbone",
        3e-3,
        "--ema_decay",
        0.8,
        "--focal_alpha",
        0.5,
    )
    assert ended.code == 0
    oof = pl.read_parquet(tmp_path / "tiny" / "fold_0" / "oof.parquet")
    assert pauc(oof["target"], oof["logit"]) > 0.19


def test_same_seed_same_weights_and_a_resumed_run_too(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = [
        *TINY,
        "--data",
        small_dataset,
        "--fold",
        0,
        "--batch_size",
        8,
        "--augmentation",
        "medium",
        "--ema_decay",
        0.9,
    ]
    for name, epochs in (("a", 3), ("b", 3)):
        assert cli("train", *flags, "--output_dir", tmp_path / name, "--epochs", epochs).code == 0
    first, second = (
        (tmp_path / name / "tiny" / "fold_0" / "oof.parquet").read_bytes() for name in "ab"
    )
    assert first == second


# --- command lines


@pytest.mark.parametrize(
    "flags",
    [
        ["--epochs", "2", "--batch_size", "32", "--fold", "0", "--use_sample"],
        [
            "--epochs",
            "1",
            "--batch_size",
            "24",
            "--accumulation_steps",
            "3",
            "--fp16",
            "--fold",
            "1",
        ],
        ["--epochs", "1", "--bf16", "--fold", "0", "--select_epoch", "best"],
        [
            "--lr",
            "5e-4",
            "--lr_backbone",
            "1e-5",
            "--epochs",
            "2",
            "--freeze_epochs",
            "1",
            "--fold",
            "0",
        ],
        ["--augmentation", "heavy", "--epochs", "1", "--fold", "0", "--num_workers", "2"],
        ["--batch_size", "16", "--accumulation_steps", "4", "--epochs", "1", "--fold", "0"],
    ],
)
def test_command_lines_run(small_dataset: Path, tmp_path: Path, cli: Cli, flags: list[str]) -> None:
    ended = cli("train", *TINY, "--data", small_dataset, "--output_dir", tmp_path, *flags)
    assert ended.code == 0, ended.err
    assert "checkpoints in" in ended.out


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_config_builds_its_backbone(name: str) -> None:
    settings = load_settings(TrainSettings, {"config": name})
    assert settings.name == name and settings.run_dir == Path("outputs") / name
    with torch.device("meta"):
        model = create_model(settings, pretrained=False)
    assert model.num_features == FEATURES.get(name, model.num_features)


# --- parts


def test_features_and_logits_have_the_contracts_shapes() -> None:
    for name, size in (("test_vit", 32), ("test_convnext", 40)):
        model = create_model(tiny_settings(model=name, image_size=size)).eval()
        with torch.inference_mode():
            features, logits = model(torch.zeros(3, size, size, 3, dtype=torch.uint8))
        assert features.shape == (3, model.num_features) and logits.shape == (3, 1)
        assert features.dtype == logits.dtype == torch.float32


def test_the_model_normalises_as_its_spec_says() -> None:
    settings = tiny_settings()
    model, spec = create_model(settings).eval(), preprocess_spec(settings)
    image = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    by_hand = ((image / 255 - torch.tensor(spec.mean)) / torch.tensor(spec.std)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        torch.testing.assert_close(model(image)[0], model.backbone(by_hand), atol=1e-4, rtol=1e-4)


def test_focal_loss_is_its_formula() -> None:
    logits, target = torch.linspace(-3, 3, 8), torch.tensor([0.0, 1.0] * 4)
    p = torch.sigmoid(logits)
    p_t, alpha_t = torch.where(target == 1, p, 1 - p), torch.where(target == 1, 0.3, 0.7)
    expected = (-alpha_t * (1 - p_t) ** 1.5 * p_t.log()).mean()
    torch.testing.assert_close(
        focal_loss(logits, target, tiny_settings(focal_alpha=0.3, focal_gamma=1.5)), expected
    )


def test_accumulated_batches_give_the_gradient_of_one(small_dataset: Path) -> None:
    """Four micro-batches of 4 and one batch of 16 lead to the same weights."""
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8))
    target, rows = torch.from_numpy((random.random(16) < 0.5).astype(np.float32)), torch.arange(16)
    weights = []
    for size, steps in ((16, 1), (4, 4)):
        settings = tiny_settings(accumulation_steps=steps)
        state = create_state(settings, torch.device("cpu"), 0)
        batches = [
            Batch(*(part[at : at + size] for part in (images, target, rows)))
            for at in range(0, 16, size)
        ]
        train_epoch(state, state.model, batches, peak_rates(1), settings, torch.device("cpu"), "")
        weights.append(torch.cat([p.detach().ravel() for p in state.model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=2e-5, rtol=1e-3)


def broken_batch(row: int, value: float = 1.0) -> Batch:
    """A batch of two equal images; a target that is not a number breaks loss and gradient."""
    return Batch(
        torch.zeros(2, 32, 32, 3, dtype=torch.uint8),
        torch.full((2,), value),
        torch.tensor([row, row + 1]),
    )


@pytest.mark.parametrize("num_after", [0, 5])
def test_a_gradient_that_is_not_finite_stops_before_the_step(num_after: int) -> None:
    """However many steps are under way when the host gets to know, the weights are those before the broken one."""
    settings, cpu = tiny_settings(clip_grad=1e9), torch.device("cpu")
    weights = []
    for tail in ([], [broken_batch(4, torch.nan), *[broken_batch(8)] * num_after]):
        state = create_state(settings, cpu, 0)
        with contextlib.suppress(NotFinite) if not tail else pytest.raises(NotFinite) as stopped:
            train_epoch(
                state, state.model, [broken_batch(0), *tail], peak_rates(9), settings, cpu, ""
            )
        moments = [value for entry in state.optimizer.state.values() for value in entry.values()]
        weights.append([*state.model.state_dict().values(), *moments])
    assert all(torch.equal(one, two) for one, two in zip(*weights, strict=True))
    sentence = stopped.value.sentence(small_table()["isic_id"])
    assert (
        "not finite at step 1, in epoch 1, on the images ISIC_0000004, ISIC_0000005; lower --lr"
        in sentence
    )


def test_loss_scaling_leaves_out_what_overflows_and_goes_on() -> None:
    settings, cpu = tiny_settings(fp16=True), torch.device("cpu")
    state = create_state(settings, cpu, 0)
    batches = [broken_batch(0), broken_batch(2, torch.nan), broken_batch(4)]
    stats = train_epoch(state, state.model, batches, peak_rates(3), settings, cpu, "")
    assert (
        stats.skipped_steps == 1
        and len(stats.losses) == state.step == 3
        and stats.mean_loss() is not None
    )
    assert state.scaler.get_scale() == 65536 / 2
    assert all(entry["step"] == 2 for entry in state.optimizer.state.values())
    assert all(weight.isfinite().all() for weight in state.model.parameters())
    with pytest.raises(NotFinite, match="not finite"):
        train_epoch(
            state, state.model, [broken_batch(2, torch.nan)] * 40, peak_rates(50), settings, cpu, ""
        )


def test_the_schedule_warms_up_and_falls_to_zero() -> None:
    factor = lr_schedule(100, 10)
    assert factor[0] == 0.1 and factor[9] == factor[10] == 1.0
    assert (np.diff(factor[10:]) < 0).all() and factor[-1] < 0.001


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        *((name, {}) for name in sorted(PRETRAINED_CONFIGS)),
        ("vit_tiny", {"freeze_epochs": 3}),
        ("vit_tiny", {"freeze_epochs": 0}),
        ("vit_tiny", {"warmup_epochs": 2.5}),
    ],
)
def test_the_backbone_warms_up_when_it_is_thawed(name: str, flags: dict[str, float]) -> None:
    """The head's rates are those of a schedule that knows of no freezing, to the bit."""
    settings = load_settings(TrainSettings, {"config": name, **flags})
    per_epoch = 40
    thaw, warmup = settings.freeze_epochs * per_epoch, round(settings.warmup_epochs * per_epoch)
    schedule = create_schedule(settings, per_epoch)
    head, backbone = schedule[HEAD], schedule[BACKBONE]
    step = np.arange(per_epoch * settings.epochs)
    cosine = 0.5 * (1 + np.cos(np.pi * ((step - warmup).clip(0) / (len(step) - warmup))))
    assert np.array_equal(head, np.where(step < warmup, (step + 1) / warmup, cosine))
    assert (backbone[:thaw] == 0).all()
    first = backbone[thaw : thaw + 3]
    np.testing.assert_allclose(first, np.arange(1, 4) / warmup * cosine[thaw : thaw + 3])
    assert first[0] < 0.03 and np.array_equal(backbone[thaw + warmup :], head[thaw + warmup :])


def test_without_warm_up_the_rates_start_at_their_peak() -> None:
    schedule = create_schedule(tiny_settings(warmup_epochs=0, freeze_epochs=1, epochs=4), 10)
    assert schedule[HEAD][0] == 1 and (schedule[BACKBONE][:10] == 0).all()
    assert np.array_equal(schedule[BACKBONE][10:], schedule[HEAD][10:])


def test_the_history_holds_the_rates_of_both_parts(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = ["--data", small_dataset, "--output_dir", tmp_path, "--fold", 0, "--batch_size", 8]
    rates = ["--epochs", 4, "--freeze_epochs", 2, "--lr", 0.01, "--lr_backbone", 0.001]
    assert cli("train", *TINY, *flags, *rates, "--layer_decay", 0.9).code == 0
    lines = (tmp_path / "tiny" / "fold_0" / "history.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines]
    head, backbone = ([entry[f"lr_{part}"] for entry in history] for part in (HEAD, BACKBONE))
    assert head[0] == 0.01 and head[1:] == sorted(head[1:], reverse=True)
    assert backbone[:2] == [0, 0] and backbone[2:] == pytest.approx(
        [rate / 10 for rate in head[2:]]
    )


def test_a_last_checkpoint_of_an_earlier_version_resumes(
    small_dataset: Path, tmp_path: Path
) -> None:
    """Its parameter groups do not name their part of the network."""
    settings = tiny_settings(data=small_dataset, output_dir=tmp_path)
    state, data = create_state(settings, torch.device("cpu"), 0), load_data(settings)
    for group in state.optimizer.param_groups:
        del group["part"]
    save_last(tmp_path / "last.pth", state, settings, data)
    restored = create_state(settings, torch.device("cpu"), 0)
    restore(restored, tmp_path / "last.pth", settings, data)
    set_lr(restored.optimizer, peak_rates(1), 0)
    assert learning_rates(restored.optimizer) == {BACKBONE: 1e-4, HEAD: 1e-3}


def test_head_and_backbone_have_their_own_rates_and_vectors_are_not_decayed() -> None:
    settings = tiny_settings(lr=1e-2, lr_backbone=1e-4, weight_decay=0.1)
    model = create_model(settings)
    groups = create_optimizer(model, settings).param_groups
    head = {id(p) for p in model.head.parameters()}
    for group in groups:
        for parameter in group["params"]:
            assert group["lr"] == (1e-2 if id(parameter) in head else 1e-4)
            assert group["weight_decay"] == 0 or parameter.ndim > 1
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_the_sampler_redraws_negatives_by_seed_and_epoch_alone() -> None:
    rows, target = np.arange(200), (np.arange(200) % 10 == 0).astype(np.float32)
    pools = create_pools(rows, target, repeats=2, per_positive=3)

    def epoch(number: int) -> list[tuple[int, int]]:
        return list(EpochSampler(pools, seed=42, epoch=number))

    first, second = epoch(0), epoch(1)
    assert first == epoch(0) and len(first) == len(EpochSampler(pools, 42)) == 2 * 20 + 60
    drawn = [row for row, _ in first]
    assert all(drawn.count(row) == 2 for row in range(0, 200, 10))
    negatives = {row for row in drawn if row % 10}
    assert len(negatives) == 60, "no negative twice"
    assert negatives != {row for row, _ in second if row % 10}


def test_use_sample_keeps_every_positive() -> None:
    table = small_table(900)
    sample = sample_rows(table, 400, seed=1)
    assert len(sample) == 400 and sample["target"].sum() == 300
    assert sample["isic_id"].is_sorted()
    assert sample_rows(table, 5000, seed=1).equals(table)


@pytest.mark.parametrize("level", LEVELS)
def test_augmentation_keeps_shape_and_repeats_with_its_seed(level: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    augmentation = create_augmentation(level)
    if augmentation is None:
        return
    results = []
    for seed in (1, 2, 1):
        augmentation.set_random_seed(seed)
        results.append(augmentation(image=image)["image"])
    assert results[0].shape == image.shape and results[0].dtype == np.uint8
    assert (results[0] == results[2]).all() and (results[0] != results[1]).any()


def test_batched_gives_a_shorter_last_group() -> None:
    assert list(batched(range(5), 2)) == [[0, 1], [2, 3], [4]]


# --- what can be wrong


def test_weights_that_cannot_be_had_stop_the_run(
    cli: Cli, small_dataset: Path, tmp_path: Path
) -> None:
    flags = [
        "--model",
        "test_vit",
        "--image_size",
        32,
        "--data",
        small_dataset,
        "--output_dir",
        tmp_path,
        "--num_workers",
        0,
    ]
    for pretrained, words in (
        ("true", "cannot be had"),
        (tmp_path / "none.safetensors", "no weights at"),
    ):
        ended = cli("train", *flags, "--pretrained", pretrained)
        assert ended.code == 2 and words in ended.err and "--pretrained false" in ended.err
    (tmp_path / "broken.safetensors").write_bytes(b"not weights")
    ended = cli("train", *flags, "--pretrained", tmp_path / "broken.safetensors")
    assert ended.code == 2
    assert "broken.safetensors is not a whole safetensors file" in ended.err


@pytest.mark.parametrize("content", [[1, 2], {1: torch.zeros(2)}, {"state_dict": 3}, sorted, None])
def test_a_file_that_holds_no_weights_is_one_sentence(content: object, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    if content is not None:
        torch.save(content, path)
    else:
        path.touch()
    with pytest.raises(
        UserError, match="the pretrained weights of test_vit cannot be had"
    ) as refused:
        create_model(tiny_settings(pretrained=str(path)))
    assert "\n" not in str(refused.value)


def test_a_local_file_of_weights_is_used(tmp_path: Path) -> None:
    backbone = create_model(tiny_settings()).backbone
    save_file(backbone.state_dict(), tmp_path / "model.safetensors")
    for given in (tmp_path / "model.safetensors", tmp_path):
        loaded = create_model(tiny_settings(pretrained=str(given))).backbone.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--force", "--resume"], "choose one"),
        (
            ["--model", "vit_tinny_patch16_224"],
            'timm has no model "vit_tinny_patch16_224", did you mean',
        ),
        (["--image_size", "40"], "should be divisible by patch size (16)"),
        (["--model", "test_vit.r160_in1kk"], 'timm has no weights "r160_in1kk" for test_vit'),
        (["--device", "cuda"], "no GPU that torch can use"),
        (["--num_folds", "40"], "are too few for 40 folds"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(
    cli: Cli, small_dataset: Path, tmp_path: Path, flags: list[str], words: str
) -> None:
    if torch.cuda.is_available() and "cuda" in flags:
        pytest.skip("this machine has a GPU")
    ended = cli("train", *TINY, "--data", small_dataset, "--output_dir", tmp_path, *flags)
    assert ended.code == 2 and words in ended.err and ended.err.count("\n") == 1


def test_bad_images_stop_the_run_or_are_left_out(
    cli: Cli, small_dataset: Path, tmp_path: Path
) -> None:
    with h5py.File(small_dataset / "train-image.hdf5", "a") as file:
        del file["ISIC_0000004"], file["ISIC_0000007"]
        file["ISIC_0000007"] = np.bytes_(jpeg()[:500])
    flags = [*TINY, "--data", small_dataset, "--output_dir", tmp_path, "--epochs", 1, "--fold", 0]
    ended = cli("train", *flags)
    assert (
        ended.code == 2 and "2 of 60 images cannot be used, the first is ISIC_0000004" in ended.err
    )
    ended = cli("train", *flags, "--on_error", "skip")
    assert ended.code == 0
    errors = dict(pl.read_parquet(tmp_path / "tiny" / "errors.parquet").iter_rows())
    assert errors == {"ISIC_0000004": "no image for this id", "ISIC_0000007": "truncated JPEG"}


def test_no_image_is_left_out_for_its_suffix(cli: Cli, small_dataset: Path, tmp_path: Path) -> None:
    """Seven of sixty in capitals, as some cameras write them, and two that cannot be read."""
    folder = small_dataset / "train-image"
    folder.mkdir()
    with h5py.File(small_dataset / "train-image.hdf5") as file:
        for row, name in enumerate(file):
            (folder / f"{name}{'.JPG' if row % 9 == 0 else '.jpg'}").write_bytes(file[name][()])
    (small_dataset / "train-image.hdf5").unlink()
    for name in ("ISIC_0000010.jpg", "ISIC_0000012.jpg"):
        (folder / name).unlink()
    (folder / "ISIC_0000010.jpg").symlink_to("/gone")
    flags = [*TINY, "--data", small_dataset, "--output_dir", tmp_path, "--epochs", 1, "--fold", 0]
    ended = cli("train", *flags, "--on_error", "skip")
    assert ended.code == 0, ended.err
    errors = dict(pl.read_parquet(tmp_path / "tiny" / "errors.parquet").iter_rows())
    dead = "a link to /gone, which does not exist"
    assert errors == {"ISIC_0000010": dead, "ISIC_0000012": "no image for this id"}


def test_one_class_only_is_refused(cli: Cli, tmp_path: Path) -> None:
    table = small_table(20).with_columns(target=pl.lit(0))
    table.write_csv(tmp_path / "train-metadata.csv")
    write_hdf5(tmp_path / "train-image.hdf5", {name: jpeg(20) for name in table["isic_id"]})
    ended = cli("train", *TINY, "--data", tmp_path, "--output_dir", tmp_path / "out")
    assert ended.code == 2 and "every target is 0" in ended.err


def test_a_network_that_scores_nothing_finite_is_one_sentence() -> None:
    held = Predictions(
        np.arange(2), np.array([0.5, np.nan], np.float32), np.full(2, np.nan, np.float32)
    )
    with pytest.raises(UserError, match=r"not finite; lower --lr"):
        score(np.array([0, 1], np.float32), held)


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("executed",))


def test_a_checkpoint_that_holds_code_is_refused_unexecuted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model_state_dict": Malicious()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="more than tensors and plain values"):
        load_checkpoint(tmp_path / "evil.pth")
    assert "executed" not in capsys.readouterr().out


def test_a_checkpoint_of_something_else_or_cut_short_is_refused(tmp_path: Path) -> None:
    torch.save({"state": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="no checkpoint of this toolkit: it lacks model_state_dict"):
        load_checkpoint(tmp_path / "other.pth")
    save_checkpoint(tmp_path / "cut.pth", **dict.fromkeys(KEYS, torch.zeros(1000)))
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:-700])
    with pytest.raises(UserError, match="is damaged"):
        load_checkpoint(tmp_path / "cut.pth")
    for content in (b"", b"hello\nworld", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(100)):
        (tmp_path / "cut.pth").write_bytes(content)
        with pytest.raises(UserError, match=r"is damaged|is not loaded"):
            load_checkpoint(tmp_path / "cut.pth")
    with pytest.raises(UserError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "none.pth")
