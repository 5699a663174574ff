import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from infer.embedding.models import find_models, open_artifact
from infer.embedding.store import read_run, scan_embeddings
from isic.runtime.errors import UserError
from isic.runtime.files import sha256
from tests.support.commands import TINY, Cli
from tests.support.fake_run import FakeRun, embed_flags
from train.deadline import OUT_OF_TIME


def test_artifacts_without_their_manifest_or_folds_are_refused(
    exported: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    run = shutil.copytree(exported, tmp_path / "tiny")
    arguments = embed_flags(run, synth_dataset, tmp_path / "out")

    def fails_with(words: str) -> None:
        ended = cli("infer", *arguments)
        assert ended.code == 2
        assert words in ended.err
        assert ended.err.count("\n") == 1

    shutil.copy(run / "fold_1" / "model.onnx", run / "fold_0")
    fails_with("does not match its manifest")
    shutil.copy(run / "fold_1" / "model.onnx.json", run / "fold_0")
    fails_with("is fold 1 of tiny, not fold 0")
    (run / "fold_0" / "model.onnx").write_bytes(b"truncated")
    fails_with("does not match its manifest")
    (run / "fold_0" / "model.onnx.json").unlink()
    fails_with("model.onnx.json is missing")
    (run / "fold_0" / "model.onnx").unlink()
    (run / "folds.parquet").unlink()
    fails_with("no fold plan")
    for fold in (1, 2):
        (run / f"fold_{fold}" / "model.onnx").unlink()
    fails_with("run `python -m export --config tiny` first")


def test_exchanged_artifacts_of_two_folds_are_refused(
    exported: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    run = shutil.copytree(exported, tmp_path / "tiny")
    for suffix, words in (
        ("", "does not match its manifest"),
        (".json", "is fold 1 of tiny, not fold 0 of tiny"),
    ):
        first = run / "fold_0" / f"model.onnx{suffix}"
        second = run / "fold_1" / f"model.onnx{suffix}"
        first.rename(tmp_path / "other")
        second.rename(first)
        (tmp_path / "other").rename(second)
        ended = cli("infer", *embed_flags(run, synth_dataset, tmp_path / "out"))
        assert ended.code == 2
        assert words in ended.err


def test_an_artifact_of_an_earlier_checkpoint_is_refused(
    exported: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    """Training a fold again leaves the artifacts of its earlier network."""
    run = shutil.copytree(exported, tmp_path / "tiny")
    record = run / "fold_1" / "best_model.pth.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "sha256": "1" * 64}))
    words = "was exported before best_model.pth was trained again; export it again"
    flags = embed_flags(run, synth_dataset, tmp_path / "out")
    for more in ([], ["--format", "model.onnx"]):
        ended = cli("infer", *flags, *more)
        assert ended.code == 2
        assert f"fold_1/model.onnx {words}" in ended.err
    with pytest.raises(UserError, match=words):
        open_artifact(run / "fold_1" / "model.onnx")
    assert open_artifact(run / "fold_0" / "model.onnx").folds == [0]


def test_an_artifact_of_a_fold_that_is_trained_again_is_refused(
    exported: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    run = Path(shutil.copytree(exported, tmp_path / "tiny"))
    where = ["--data", synth_dataset, "--output_dir", tmp_path, "--num_folds", 3, "--fold", 1]
    again = [*TINY, *where, "--epochs", 2]
    assert cli("train", *again, "--force", "--max_hours", 1e-9).code == OUT_OF_TIME
    artifact = run / "fold_1" / "model.onnx"
    flags = embed_flags(run, synth_dataset, tmp_path / "out")
    for more, state in (
        ([], "which is not finished"),
        (["--resume"], "best_model.pth was trained"),
    ):
        if more:
            assert cli("train", *again, *more).code == 0
        ended = cli("infer", *flags)
        assert ended.code == 2
        assert f"{artifact} was exported before " in ended.err
        assert state in ended.err
        with pytest.raises(UserError, match=state):
            open_artifact(artifact)


@pytest.mark.parametrize("name", ["*", "[a", "", "/etc/passwd", "../fold_0/model.null", "**"])
def test_a_format_is_not_a_path_or_a_pattern(
    fake_run: FakeRun, tmp_path: Path, cli: Cli, name: str
) -> None:
    model_dir = Path(shutil.copytree(fake_run.model_dir, tmp_path / "null"))
    shutil.copytree(model_dir / "fold_0", model_dir / "fold_0_old")
    flags = FakeRun(fake_run.data, model_dir).flags(tmp_path / "out")
    assert cli("infer", *flags).code == 0, "fold_0_old is not a fold"
    ended = cli("infer", *flags, "--force", f"--format={name}")
    assert ended.code == 2
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize(("field", "value"), [("model", "vit_other"), ("num_features", 7)])
def test_folds_of_other_networks_are_refused(
    field: str, value: object, exported: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(exported, tmp_path / "tiny")
    path = run / "fold_2" / "model.onnx.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(UserError, match="differ in their network; train and export them alike"):
        find_models(run, "tiny", "onnx")


def test_folds_with_other_auxiliary_targets_are_refused(fake_run: FakeRun, tmp_path: Path) -> None:
    run = Path(shutil.copytree(fake_run.model_dir, tmp_path / "null"))
    definitions = {"mel": "iddx_full ~ Melanoma", "seen": "lesion_id"}

    def write(fold: int, aux: dict[str, str]) -> None:
        path = run / f"fold_{fold}" / "model.null.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "aux": aux}))

    assert find_models(run, "null", "null").aux == {}
    for fold in range(3):
        write(fold, definitions)
    assert find_models(run, "null", "null").aux == definitions
    for other in ({}, {"mel": "iddx_full ~ Mel"}, dict(reversed(definitions.items()))):
        write(2, other)
        with pytest.raises(UserError, match=r"fold_0 and fold_2 in .* differ in their auxiliary"):
            find_models(run, "null", "null")


@pytest.mark.slow
def test_views_inside_the_artifact_give_the_embeddings_of_views_on_the_host(
    exported: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    run = shutil.copytree(exported, tmp_path / "tiny")
    tables, lines = {}, {}
    for name in ("host", "graph"):
        if name == "graph":
            for tta in ("d4", "flips"):
                ended = cli("export", "--config", "tiny", "--model_dir", run, "--tta", tta)
                assert ended.code == 0, ended.err
        flags = ("--split", "test", "--tta", "d4", "--dtype", "float32")
        ended = cli("infer", *embed_flags(run, synth_dataset, tmp_path / name, *flags))
        assert ended.code == 0, ended.err
        lines[name] = ended.out.splitlines()[0]
        tables[name] = scan_embeddings(tmp_path / name / "tiny", "test").collect()
    assert lines["host"].startswith("using onnx fp32: ")
    assert lines["graph"].startswith("using onnx fp32 with d4 inside: ")
    keys = ["isic_id", "fold"]
    assert tables["host"].select(keys).equals(tables["graph"].select(keys))
    for column in ("features", "logit"):
        both = (np.stack(tables[name][column].to_numpy()) for name in tables)
        np.testing.assert_allclose(*both, atol=1e-5)
    assert len(pl.concat(tables.values())) > 0
    assert read_run(tmp_path / "graph" / "tiny", "test")["tta"] == "d4"
    models = find_models(run, "tiny", "auto", tta="d4")
    assert (models.tta, models.host_tta("d4")) == ("d4", "none")
    plain = find_models(run, "tiny", "model.onnx", tta="d4")
    assert (plain.tta, plain.host_tta("d4")) == ("none", "d4")
    for tta in ("none", "flips"):
        assert find_models(run, "tiny", "auto", tta=tta).tta == tta
        with pytest.raises(UserError, match=r"means over the views of d4; add --tta d4"):
            find_models(run, "tiny", "model.d4.onnx", tta=tta)


def test_a_resumed_run_keeps_its_engine(
    exported: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    """A better artifact, exported in between, must not end the run with a refusal."""
    run = shutil.copytree(exported, tmp_path / "tiny")
    half = {}
    for path in run.glob("fold_*/model.onnx"):
        copy = path.with_name("model.fp16.onnx")
        fields = json.loads(path.with_name("model.onnx.json").read_text())
        half[copy] = {**fields, "artifact": copy.name, "precision": "fp16"}
        path.rename(copy)
        path.with_name("model.onnx.json").unlink()
        copy.with_name(f"{copy.name}.json").write_text(json.dumps(half[copy]))
    flags = embed_flags(run, synth_dataset, tmp_path / "out", "--split", "test")
    first = cli("infer", *flags)
    assert first.out.startswith("using onnx fp16: the best exported artifact for the "), first.err
    for path in exported.glob("fold_*/model.onnx"):
        for source in (path, path.with_name("model.onnx.json")):
            fields = run / path.parent.name / source.name
            shutil.copy(source, fields)
        # The copies have one digest, so the other artifact gets another one.
        better = run / path.parent.name / "model.onnx"
        better.write_bytes(better.read_bytes() + b"\x72\x00")
        manifest = json.loads(better.with_name("model.onnx.json").read_text())
        manifest["sha256"] = sha256(better)
        better.with_name("model.onnx.json").write_text(json.dumps(manifest))
    next((tmp_path / "out").rglob("part-*.parquet")).unlink()
    resumed = cli("infer", *flags)
    assert resumed.code == 0, resumed.err
    assert resumed.out.startswith("using onnx fp16: the run to resume was made with it")
    again = cli("infer", *flags, "--force", "--device", "cpu")
    assert again.out.startswith("using onnx fp32: the best exported artifact for the CPU")


def test_only_artifacts_that_fit_the_flags_are_taken(
    exported: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    run = shutil.copytree(exported, tmp_path / "tiny")
    for path in run.glob("fold_*/model.onnx.json"):
        fields = json.loads(path.read_text())
        path.write_text(json.dumps({**fields, "precision": "int8"}))
    flags = embed_flags(run, synth_dataset, tmp_path / "out", "--split", "test")
    for more, words in (
        ((), "an exported model for these flags, only onnx int8; use --precision int8, or run `"),
        (("--format", "onnx"), "with onnx for these flags, only onnx int8; use --precision int8,"),
        (("--precision", "fp16"), "run `python -m export --config tiny --precision fp16` first"),
        (("--format", "aoti"), "has no fold_<k> with aoti; run `python -m export --config tiny "),
    ):
        ended = cli("infer", *flags, *more)
        assert ended.code == 2
        assert words in ended.err
        assert ended.err.count("\n") == 1
    ended = cli("infer", *flags, "--precision", "int8")
    assert ended.out.startswith("using onnx int8: ")
    path = run / "fold_1" / "model.onnx.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "precision": "fp16"}))
    ended = cli("infer", *flags, "--force")
    assert ended.code == 0, "the folds with int8 are left out, with a note"
    assert "note: fold_0, fold_2 in " in ended.out
    path = run / "fold_2" / "model.onnx.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "precision": "fp32"}))
    ended = cli("infer", *flags, "--force")
    assert ended.code == 2
    assert "no fitting one of onnx fp16, onnx fp32, onnx int8 is in every fold of " in ended.err
    for fold in range(3):
        path = run / f"fold_{fold}" / "model.onnx.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "precision": "int8"}))
    assert cli("infer", *flags, "--force", "--precision", "int8").code == 0
    assert cli("infer", *flags, "--quiet", "--precision", "int8").out.startswith("up to date")
