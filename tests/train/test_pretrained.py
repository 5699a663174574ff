import json
import shutil
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file

from isic.provenance import NOTHING, read_seen
from isic.runtime.config import read_yaml
from isic.runtime.errors import UserError
from isic.runtime.files import sha256
from isic.runtime.urls import local_path
from tests.support.commands import TINY, Cli, Finished
from tests.support.datasets import jpeg as make_jpeg
from tests.support.datasets import small_table, write_hdf5
from tests.support.s3 import Bucket
from train import pretrained
from train.checkpoint import load_checkpoint
from train.pretrained import find_weights

Train = Callable[..., Finished]


@pytest.fixture
def train(small_dataset: Path, tmp_path: Path, cli: Cli) -> Train:
    """Runs `python -m train` on the small dataset, three folds of one epoch."""

    def run(name: str, *flags: object) -> Finished:
        where = ("--data", small_dataset, "--output_dir", tmp_path, "--num_folds", 3)
        return cli("train", *TINY, *where, "--epochs", 1, "--name", name, *flags)

    return run


def held_out(run: Path, fold: int) -> set[str]:
    plan = pl.read_parquet(run / "folds.parquet")
    return set(plan.filter(pl.col("fold") == fold)["isic_id"])


def seen_ids(run: Path, fold: int) -> set[str]:
    return set(read_seen(run / f"fold_{fold}" / "trained_on.parquet")["isic_id"])


def test_weights_that_learned_from_held_out_rows_are_refused(train: Train, tmp_path: Path) -> None:
    assert train("old").code == 0
    backbone = tmp_path / "old" / "fold_0" / "backbone"

    ended = train("leak", "--fold", 1, "--pretrained", backbone)
    assert ended.code == 2
    assert "learned from 20 of the 20 held-out rows or from their patients" in ended.err
    assert not (tmp_path / "leak").exists()

    ended = train("leak", "--pretrained", backbone)
    assert ended.code == 2, "refused before fold 0, the only sound one, begins"
    assert not (tmp_path / "leak").exists()

    ended = train("sound", "--fold", 0, "--pretrained", backbone)
    assert ended.code == 0, ended.err


def test_each_fold_starts_from_the_same_fold_of_a_run(train: Train, tmp_path: Path) -> None:
    assert train("old").code == 0
    ended = train("new", "--pretrained", tmp_path / "old")
    assert ended.code == 0, ended.err
    assert "warning" not in ended.err, "on purpose"
    for fold in range(3):
        file = tmp_path / "old" / f"fold_{fold}" / "backbone" / "model.safetensors"
        text = (tmp_path / "new" / f"fold_{fold}" / "best_model.pth.json").read_text()
        started_from = json.loads(text)["pretrained"]
        assert started_from["source"] == str(file)
        assert started_from["sha256"] == sha256(file)


@pytest.mark.slow
def test_data_and_weights_may_be_remote(
    train: Train, small_dataset: Path, tmp_path: Path, bucket: Bucket
) -> None:
    assert train("old", "--fold", 0).code == 0
    data = bucket.put_folder(small_dataset, "set")
    old = bucket.put_folder(tmp_path / "old", "old")
    flags = ("--fold", 0, "--data", data)
    ended = train("new", *flags, "--pretrained", old)
    assert ended.code == 0, ended.err
    directory = tmp_path / "new" / "fold_0"
    started_from = json.loads((directory / "best_model.pth.json").read_text())["pretrained"]
    backbone = "fold_0/backbone/model.safetensors"
    assert started_from["source"] == f"{old}/{backbone}"
    assert started_from["sha256"] == sha256(tmp_path / "old" / backbone)
    saved = read_yaml(directory / "config.yaml")
    assert (saved["data"], saved["pretrained"]) == (data, old)
    fetched = {path.name for path in local_path(old, "fetched").rglob("*") if path.is_file()}
    assert fetched == {"model.safetensors", "trained_on.parquet"}

    leak = train("leak", "--fold", 1, "--data", data, "--pretrained", f"{old}/fold_0/backbone")
    assert leak.code == 2
    assert "held-out rows" in leak.err
    alone = train("alone", *flags, "--pretrained", f"{old}/{backbone}")
    assert alone.code == 2
    assert f"{old}/{backbone} was trained by this toolkit, but its list" in alone.err


def test_the_list_is_inherited_through_a_chain(
    train: Train, small_dataset: Path, tmp_path: Path
) -> None:
    """old: these images; between: other images from old; then these images again from between."""
    assert train("old", "--fold", 0).code == 0
    other = other_dataset(tmp_path / "other", "X")

    start = tmp_path / "old" / "fold_0" / "backbone"
    ended = train("between", "--fold", 1, "--data", other, "--pretrained", start)
    assert ended.code == 0, ended.err
    inherited = seen_ids(tmp_path / "old", 0)
    assert inherited < seen_ids(tmp_path / "between", 1)

    start = tmp_path / "between" / "fold_1" / "backbone"
    ended = train("new", "--fold", 2, "--pretrained", start)
    assert ended.code == 2
    assert "learned from 20 of the 20 held-out rows" in ended.err


def other_dataset(folder: Path, letter: str) -> Path:
    """Write a copy of the small dataset whose ids and patients begin with another letter."""
    folder.mkdir()
    table = small_table().with_columns(pl.col("isic_id", "patient_id").str.replace("I", letter))
    table.write_csv(folder / "train-metadata.csv")
    files = {name: make_jpeg(40, seed=row) for row, name in enumerate(table["isic_id"])}
    write_hdf5(folder / "train-image.hdf5", files)
    return folder


@pytest.mark.slow
def test_three_runs_pass_on_fold_by_fold_what_they_have_seen(
    train: Train, tmp_path: Path, cli: Cli
) -> None:
    """first: these images; second: others, from first; third: yet others, from second."""
    assert train("first").code == 0
    for name, letter, start in (("second", "X", "first"), ("third", "Y", "second")):
        data = other_dataset(tmp_path / letter, letter)
        ended = train(name, "--data", data, "--pretrained", tmp_path / start)
        assert ended.code == 0, ended.err
    runs = [tmp_path / name for name in ("first", "second", "third")]
    for fold in range(3):
        own = [set(pl.read_parquet(run / "folds.parquet")["isic_id"]) for run in runs]
        learned = [ids - held_out(run, fold) for ids, run in zip(own, runs, strict=True)]
        assert seen_ids(runs[2], fold) == set.union(*learned)
    ended = train("again", "--pretrained", runs[2])
    assert ended.code == 0, "each fold has seen what the same fold of the first run has"
    ended = train("other_plan", "--split_seed", 7, "--pretrained", runs[2])
    assert ended.code == 2
    assert "held-out rows or from their patients" in ended.err
    fold = runs[2] / "fold_1"
    start = runs[1] / "fold_1" / "backbone" / "model.safetensors"
    weights = json.loads((fold / "best_model.pth.json").read_text())["pretrained"]
    assert (weights["source"], weights["sha256"]) == (str(start), sha256(start))
    assert load_checkpoint(fold / "best_model.pth")["config"]["pretrained"] == weights
    card = (fold / "backbone" / "README.md").read_text()
    assert f"from the weights `{start}` (sha256 `{sha256(start)}`, tensors_sha256 `" in card

    ended = cli("export", "--config", "third", "--model_dir", runs[2])
    assert ended.code == 0, ended.err
    assert json.loads((fold / "model.onnx.json").read_text())["pretrained"] == weights
    where = ("--data", tmp_path / "Y", "--output_dir", tmp_path / "out")
    ended = cli("infer", "embed", "--config", "third", "--model_dir", runs[2], *where)
    assert ended.code == 0, ended.err
    embeddings = tmp_path / "out" / "third"
    recorded = json.loads((embeddings / "train" / "run.json").read_text())["pretrained"]
    assert recorded["1"] == weights
    assert len({each["sha256"] for each in recorded.values()}) == 3
    flags = ("--features", "image", "--embeddings", embeddings, "--name", "both")
    ended = cli("infer", "fit", *flags, *where)
    assert ended.code == 0, ended.err
    manifest = json.loads((tmp_path / "out" / "both" / "ensemble.json").read_text())
    assert manifest["embeddings"]["third"]["pretrained"] == recorded
    report = (tmp_path / "out" / "both" / "report.html").read_text()
    assert f"{start} (sha256 {sha256(start)})" in report


def test_a_folder_without_weights_of_the_fold_is_refused(train: Train, tmp_path: Path) -> None:
    assert train("old", "--fold", 0).code == 0
    ended = train("new", "--pretrained", tmp_path / "old")
    assert ended.code == 2
    message = f"{tmp_path / 'old'} has no model.safetensors and no fold_1/backbone"
    assert f"{message}; give a backbone of it, such as" in ended.err
    assert not (tmp_path / "new").exists()


def test_a_fold_has_not_seen_its_held_out_rows(train: Train, tmp_path: Path) -> None:
    assert train("last", "--fold", 0).code == 0
    run = tmp_path / "last"
    assert seen_ids(run, 0) == set(small_table()["isic_id"]) - held_out(run, 0)
    assert train("best", "--fold", 0, "--select_epoch", "best").code == 0
    assert seen_ids(tmp_path / "best", 0) == set(small_table()["isic_id"]), "it chose its epoch"


def test_weights_that_were_moved_from_their_list_are_refused(train: Train, tmp_path: Path) -> None:
    assert train("old", "--fold", 0).code == 0
    fold = tmp_path / "old" / "fold_0"
    moved = tmp_path / "weights.safetensors"
    shutil.copy(fold / "backbone" / "model.safetensors", moved)
    with pytest.raises(UserError, match="its list of images is not next to it; copy"):
        find_weights(str(moved), 0)
    shutil.copy(fold / "trained_on.parquet", tmp_path)
    assert len(find_weights(str(moved), 0).seen) == 40
    pl.DataFrame({"isic_id": ["a"], "patient_id": ["a"]}).write_parquet(
        tmp_path / "trained_on.parquet"
    )
    with pytest.raises(UserError, match="its list of images is not next to it; copy"):
        find_weights(str(moved), 0)


def test_a_misspelt_path_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing at .*demo; give a file or folder that exists"):
        find_weights(f"{tmp_path}/demo", 0)
    assert pretrained.local_file(f"hf-hub:{tmp_path}/demo") is None
    assert pretrained.local_file("no_such_folder/demo") is None, "a repository"


def test_weights_of_a_hub_are_recognised_too(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backbone of a run, uploaded, with and without its list; no hub is reached."""
    assert train("first").code == 0
    fold_dir = tmp_path / "first" / "fold_0"
    repository = tmp_path / "hub"
    shutil.copytree(fold_dir / "backbone", repository)

    def download(name: str, file: str, revision: str | None) -> str:
        assert (name, revision) == ("me/backbone", "v1")
        path = repository / file
        if not path.is_file():
            raise EntryNotFoundError(file)
        return str(path)

    monkeypatch.setattr(pretrained, "hf_hub_download", download)
    monkeypatch.setattr(pretrained, "hub_file", pretrained.hub_file.__wrapped__)
    lacking = train("lacking", "--pretrained", "me/backbone@v1")
    assert lacking.code == 2
    assert "its list of images is not in the repository" in lacking.err
    shutil.copy(fold_dir / "trained_on.parquet", repository)
    leaking = train("leaking", "--pretrained", "me/backbone@v1")
    assert leaking.code == 2
    assert "the weights in me/backbone@v1" in leaking.err
    (repository / "model.safetensors").unlink()
    assert pretrained.seen_by_hub("me/backbone@v1") is NOTHING


@pytest.mark.parametrize(
    "failure", [ConnectionError("no route"), LocalEntryNotFoundError("no answer")]
)
def test_a_hub_is_asked_once_unless_it_fails(
    failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Exception] = [failure, EntryNotFoundError("no such file")]

    def download(*_: object, **__: object) -> str:
        raise answers.pop(0)

    monkeypatch.setattr(pretrained, "hf_hub_download", download)
    pretrained.hub_file.cache_clear()
    with pytest.raises(UserError, match=rf"^the hub cannot be asked .* \({failure}\); connect"):
        find_weights("me/backbone", 0)
    for fold in range(3):
        assert find_weights("me/backbone", fold).seen is NOTHING
    assert not answers, "the failure is not kept, the answer is"
    pretrained.hub_file.cache_clear()


def test_a_resumed_run_started_from_the_same_weights(train: Train, tmp_path: Path) -> None:
    assert train("old").code == 0
    weights = tmp_path / "weights.pth"
    shutil.copy(tmp_path / "old" / "fold_0" / "trained_on.parquet", tmp_path)
    file = tmp_path / "old" / "fold_0" / "backbone" / "model.safetensors"

    tensors = load_file(file)
    torch.save(tensors, weights)
    assert train("new", "--fold", 0, "--pretrained", weights).code == 0
    fold = tmp_path / "new" / "fold_0"
    (fold / "oof.parquet").unlink()
    torch.save({name: tensor * 2 for name, tensor in tensors.items()}, weights)
    ended = train("new", "--fold", 0, "--pretrained", weights, "--resume")
    assert ended.code == 2
    assert "started from other weights than" in ended.err


def test_the_manifest_names_random_weights(train: Train, tmp_path: Path) -> None:
    assert train("old", "--fold", 0).code == 0
    text = (tmp_path / "old" / "fold_0" / "best_model.pth.json").read_text()
    assert json.loads(text)["pretrained"] == {"source": "random"}
