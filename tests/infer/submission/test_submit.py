import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from infer.submission import submit as module
from infer.submission.settings import SubmitSettings
from infer.submission.submit import find_data, submit
from isic.runtime.errors import UserError
from isic.runtime.files import read_json, write_text
from tests.infer.submission.conftest import Project
from tests.support import fake_driver
from tests.support.commands import run_module
from tests.support.datasets import small_disk, write_hdf5
from tests.support.processes import running

ON_GPU = "tiny runs on no GPU"


def run(made: Path, data: Path, output: Path, **more: object) -> Path:
    """Submit; return the path."""
    values = {"bundle": made, "data": data, "output": output, "device": "cpu"} | more
    assert submit(SubmitSettings.model_validate(values)) == 0
    return output


def used(output: Path) -> str:
    """Return the candidate of a submission."""
    return str(read_json(output.with_name(f"{output.name}.json"))["bundle"]["candidate"])


def by_hand(project: Project, data: Path, output: Path, ensemble: str, *networks: str) -> bytes:
    """Return the submission of the commands that a bundle replaces."""
    embeddings = output.parent / "by_hand"
    for name in networks:
        where = ("--model_dir", project.runs / name, "--data", data, "--out", embeddings)
        run_module("infer", "embed", "--config", name, *where, "--split", "test", "--max_bad", 1)
    flags = ["--ensemble", project.ensembles / ensemble, "--data", data, "--output", output]
    if networks:
        flags += ["--embeddings", ",".join(str(embeddings / name) for name in networks)]
    run_module("infer", "predict", *flags)
    return output.read_bytes()


@pytest.fixture
def dataset(project: Project, tmp_path: Path) -> Path:
    """A copy of the test split, to be changed."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("test-metadata.csv", "test-image.hdf5", "sample_submission.csv"):
        shutil.copyfile(project.data / name, folder / name)
    return folder


def rewrite_images(dataset: Path, change: dict[str, bytes | None]) -> None:
    """Replace the content of some images; None removes one."""
    path = dataset / "test-image.hdf5"
    with h5py.File(path) as file:
        files = {name: bytes(file[name][()]) for name in file}
    path.unlink()
    changed = {**files, **change}
    write_hdf5(path, {name: data for name, data in changed.items() if data is not None})


def ids_of(dataset: Path) -> list[str]:
    return pl.read_csv(dataset / "test-metadata.csv")["isic_id"].to_list()


def test_a_submission_is_that_of_the_commands_run_by_hand(
    made: Path, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = run(made, project.data, tmp_path / "submission.csv", strict=True)
    said = capsys.readouterr().out
    # By tables first, then by each network that is done.
    order = [said.index(text) for text in ("without images", "with tiny:", "with tiny, tiny_b:")]
    assert order == sorted(order)
    expected = by_hand(project, project.data, tmp_path / "hand.csv", "final", "tiny", "tiny_b")
    assert output.read_bytes() == expected
    assert not (tmp_path / "submission_work").exists()


def test_the_drift_from_training_is_written_beside_it(
    made: Path, project: Project, tmp_path: Path
) -> None:
    output = run(made, project.data, tmp_path / "submission.csv")
    by_hand(project, project.data, tmp_path / "hand.csv", "final", "tiny", "tiny_b")
    drift = [pl.read_parquet(tmp_path / f"{name}_drift.parquet") for name in (output.stem, "hand")]
    assert_frame_equal(*drift)


def test_drift_that_cannot_be_measured_costs_no_submission(
    made: Path,
    project: Project,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("infer.submission.submit.drift_of", fail)
    output = run(made, project.data, tmp_path / "submission.csv")
    assert used(output).startswith("final, with tiny, tiny_b")
    assert not (tmp_path / "submission_drift.parquet").exists()
    assert "the drift from training is not measured: MemoryError" in capsys.readouterr().err


def test_the_test_split_needs_no_fold_plan_and_no_training_rows(
    made: Path, dataset: Path, tmp_path: Path
) -> None:
    assert not list(made.rglob("networks/**/folds.parquet"))
    output = run(made, dataset, tmp_path / "submission.csv", strict=True)
    assert used(output).startswith("final, with tiny, tiny_b")


def test_rows_keep_the_order_and_the_ids_of_a_shuffled_sample(
    made: Path, dataset: Path, tmp_path: Path
) -> None:
    sample = pl.read_csv(dataset / "sample_submission.csv")
    shuffled = sample.sample(fraction=1, shuffle=True, seed=3)
    assert not shuffled.equals(sample)
    shuffled.write_csv(dataset / "sample_submission.csv")
    output = run(made, dataset, tmp_path / "submission.csv")
    assert pl.read_csv(output)["isic_id"].equals(shuffled["isic_id"])


def test_rows_without_a_usable_image_are_scored_without_images(
    made: Path, project: Project, dataset: Path, tmp_path: Path
) -> None:
    ids = ids_of(dataset)
    rewrite_images(dataset, {ids[3]: b"no image", ids[7]: None})
    output = run(made, dataset, tmp_path / "submission.csv")
    assert read_json(output.with_name("submission.csv.json"))["bundle"]["rows_without_image"] == 2
    found = pl.read_csv(output)["target"]
    expected = by_hand(project, dataset, tmp_path / "hand.csv", "final", "tiny", "tiny_b")
    assert expected != output.read_bytes()
    others = [row for row in range(len(ids)) if row not in {3, 7}]
    by_images = pl.read_csv(tmp_path / "hand.csv")["target"]
    assert found.gather(others).equals(by_images.gather(others))
    # As high among all scores with images as the scores without images are among their own.
    by_hand(project, dataset, tmp_path / "tables.csv", "tables")
    tables = pl.read_csv(tmp_path / "tables.csv")["target"]
    oof = {
        name: pl.read_parquet(project.ensembles / name / "oof.parquet")["blend"]
        for name in ("tables", "final")
    }
    for row in (3, 7):
        own, other = (
            (values < score).mean()
            for values, score in ((oof["tables"], tables[row]), (oof["final"], found[row]))
        )
        assert own == pytest.approx(other, abs=0.02)
    with pytest.raises(UserError, match=ids[3]):
        run(made, dataset, tmp_path / "strict.csv", strict=True)


def test_a_network_file_cut_short_loses_that_network_only(
    made: Path, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(made, tmp_path / "bundle"))
    path = broken / "networks" / "tiny_b" / "fold_1" / "model.onnx"
    path.write_bytes(path.read_bytes()[:1000])
    output = run(broken, project.data, tmp_path / "submission.csv")
    assert used(output).startswith("final by tables, one, with tiny:")
    warned = capsys.readouterr().err
    assert "warning: tiny_b is left out: " in warned
    assert "without tiny_b the out-of-fold pAUC is " in warned
    with pytest.raises(UserError, match="tiny_b is left out"):
        run(broken, project.data, tmp_path / "strict.csv", strict=True)
    # Even then a submission is there.
    assert used(tmp_path / "strict.csv").startswith("final by tables, one")


def test_a_dataset_without_usable_images_is_submitted_by_tables(
    made: Path, project: Project, dataset: Path, tmp_path: Path
) -> None:
    (dataset / "test-image.hdf5").write_bytes(b"cut short")
    output = run(made, dataset, tmp_path / "submission.csv")
    # A blend of one member has the ranks of its scores.
    tables = by_hand(project, dataset, tmp_path / "hand.csv", "tables")
    ranks = [pl.read_csv(path)["target"].rank() for path in (output, tmp_path / "hand.csv")]
    assert ranks[0].equals(ranks[1])
    assert tables


@pytest.mark.parametrize(
    ("allowed", "candidate"),
    [(0, "by tables, without images"), (1, "by tables, one, with tiny:"), (9, "tiny, tiny_b")],
    ids=["before the first network", "before the second", "never"],
)
def test_networks_that_would_not_end_in_time_are_left_out(
    allowed: int,
    candidate: str,
    made: Path,
    project: Project,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Clock(module.Clock):
        num_networks = 0

        @property
        def seconds_left(self) -> float:
            return 1e6 if len(embedded) < allowed else -1.0

    embedded: list[str] = []
    embed = module.embed_splits

    def counted(settings: module.EmbedSettings, watch: object) -> None:
        embed(settings, watch)  # type: ignore[arg-type]
        embedded.append(settings.config)

    monkeypatch.setattr(module, "Clock", Clock)
    monkeypatch.setattr(module, "embed_splits", counted)
    output = run(made, project.data, tmp_path / "submission.csv", hours=1)
    assert candidate in used(output)


def test_a_network_that_is_too_slow_is_left_out_in_the_middle(
    made: Path,
    project: Project,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At its first batch it is known to need more time than there is."""
    monkeypatch.setattr(module, "SECONDS_TO_TIME", 0.0)
    monkeypatch.setattr(module.Progress, "seconds_left", 3600.0)
    output = run(made, project.data, tmp_path / "submission.csv", hours=0.5)
    assert "by tables, without images" in used(output)
    assert "60 min more are needed" in capsys.readouterr().err


@pytest.fixture
def calibrated(project: Project, tmp_path: Path) -> Path:
    """A bundle of the blend with a curve from scores to probabilities."""
    members = [project.ensembles / name for name in ("tables", "one", "both")]
    flags = ("--data", project.data, "--out", tmp_path, "--name", "curve", "--calibrate", "platt")
    run_module("infer", "blend", *members, *flags)
    return project.bundle(tmp_path / "bundle", ensemble=tmp_path / "curve")  # type: ignore[arg-type]


def test_only_the_whole_blend_has_probabilities(
    calibrated: Path, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The curve was fitted on mean ranks of all members, and those of fewer spread wider."""
    run(calibrated, project.data, tmp_path / "whole.csv")
    assert "probability" in pl.read_parquet(tmp_path / "whole_models.parquet").columns
    assert "probabilities" not in capsys.readouterr().err
    output = run(calibrated, project.data, tmp_path / "part.csv", hours=1e-9)
    assert used(output).startswith("curve by tables, without images")
    assert "probability" not in pl.read_parquet(tmp_path / "part_models.parquet").columns
    assert "and there are no probabilities" in capsys.readouterr().err


def test_the_drift_of_a_part_compares_the_parts_own_scores(
    made: Path, project: Project, tmp_path: Path
) -> None:
    run(made, project.data, tmp_path / "part.csv", hours=1e-9)
    by_hand(project, project.data, tmp_path / "hand.csv", "tables")
    # The part has the ranks of the only member's scores, so its shares at the quantiles.
    own, alone = (
        pl.read_parquet(tmp_path / f"{name}_drift.parquet").filter(column="score")
        for name in ("part", "hand")
    )
    assert own["ks"].item() == pytest.approx(alone["ks"].item(), abs=1e-9)


@pytest.mark.parametrize(
    ("step", "strict", "is_there", "code"),
    [("scoring", False, True, 0), ("embedding", True, True, 2), ("scoring", False, False, 2)],
)
def test_a_step_that_does_not_end_is_named_and_ends_the_process(
    step: str,
    strict: bool,
    is_there: bool,
    code: int,
    made: Path,
    project: Project,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class EndedError(BaseException):
        """In place of the end of the process."""

    def end(code: int) -> None:
        raise EndedError(code)

    monkeypatch.setattr(module, "end_process", end)
    bundle = module.open_bundle(made)
    values = {"bundle": made, "data": project.data, "output": tmp_path / "s.csv", "hours": 1}
    settings = SubmitSettings.model_validate({**values, "strict": strict})
    test = module.read_test_table(module.Dataset(project.data))
    run = module.Run(settings, bundle, test, module.Clock(1.0))
    if is_there:
        run._write(run._fallback)
    hangs = "score_table" if step == "scoring" else "choose_engine"
    monkeypatch.setattr(module, hangs, lambda *_, **__: run.give_up())
    with pytest.raises(EndedError, match=f"^{code}$"):
        if step == "scoring":
            run._score(run._fallback)
        else:
            run._embed(next(iter(bundle.networks.values())), 0.0)
    said = capsys.readouterr().err
    assert f"{'error' if code else 'warning'}: --hours 1.0 are over and the {step} " in said
    assert ("stays" in said) == is_there


def test_no_time_at_all_still_submits(made: Path, project: Project, tmp_path: Path) -> None:
    output = run(made, project.data, tmp_path / "submission.csv", hours=1e-9)
    assert "without images" in used(output)


def test_training_rows_are_named_once(
    made: Path, project: Project, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pl.read_csv(dataset / "test-metadata.csv", infer_schema=False)
    train = pl.read_csv(project.data / "train-metadata.csv", infer_schema=False)[10:15]
    pl.concat([table, train.select(table.columns)]).write_csv(dataset / "test-metadata.csv")
    (dataset / "sample_submission.csv").unlink()
    with h5py.File(project.data / "train-image.hdf5") as file:
        rewrite_images(dataset, {name: bytes(file[name][()]) for name in train["isic_id"]})
    output = run(made, dataset, tmp_path / "submission.csv", strict=True)
    assert used(output).startswith("final, with tiny, tiny_b")
    total, first = len(table) + 5, train["isic_id"].min()
    warning = f"warning: 5 of {total:,} rows, such as {first}, were in the fit, so their scores are"
    warned = capsys.readouterr().err
    assert warned.count(warning) == 1
    assert warned.count("were in the fit") == 1


def test_unseen_categories_and_single_lesions_are_submitted(
    made: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = dataset / "test-metadata.csv"
    table = pl.read_csv(path, infer_schema=False)
    one_each = pl.Series("patient_id", [f"IP_{row:07d}" for row in range(len(table))])
    table.with_columns(one_each, attribution=pl.lit("Elsewhere")).write_csv(path)
    output = run(made, dataset, tmp_path / "submission.csv")
    assert used(output).startswith("final, with tiny, tiny_b")
    warned = capsys.readouterr().err
    assert (
        'attribution has values that no training row has, scored as unknown: "Elsewhere"' in warned
    )
    assert "patients" in warned


def test_a_full_disk_leaves_the_submission_by_tables(
    made: Path, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "full", "8k"):
        output = run(made, project.data, tmp_path / "submission.csv", work=tmp_path / "full" / "w")
    assert "by tables, without images" in used(output)
    assert "the disk is full" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(5, "Input/output error"), pl.exceptions.ComputeError("odd")]
)
def test_no_error_of_a_network_ends_the_run(
    error: Exception,
    made: Path,
    project: Project,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first network fills the disk and fails, the second one has the disk for itself."""
    seen = []

    def fails(settings: module.EmbedSettings, watch: object) -> None:
        seen.append([path.name for path in settings.output_dir.glob("*")])
        for name in ("tiny", "tiny_b"):
            (settings.output_dir / name).mkdir(parents=True)
        raise error

    monkeypatch.setattr(module, "embed_splits", fails)
    output = run(made, project.data, tmp_path / "submission.csv")
    assert "by tables, without images" in used(output)
    assert f"tiny is left out: {type(error).__name__}" in capsys.readouterr().err
    assert seen == [[], ["tiny_b"]]
    assert not (tmp_path / "submission_work").exists()


def test_a_batch_that_does_not_fit_the_gpu_is_made_smaller(
    made: Path, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = module.embed_splits

    def full(settings: module.EmbedSettings, watch: object) -> None:
        if settings.batch_size is None:
            raise UserError("out of memory; use a smaller --batch_size")
        embed(settings.model_copy(update={"device": "cpu"}), watch)  # type: ignore[arg-type]

    on_gpu = module.Engine("onnx", "fp32", "cuda", 1)
    monkeypatch.setattr(module, "choose_engine", lambda *_: (on_gpu, []))
    monkeypatch.setattr(module, "embed_splits", full)
    output = run(made, project.data, tmp_path / "submission.csv")
    assert used(output).startswith("final, with tiny, tiny_b")


def test_a_gpu_that_fails_twice_is_replaced_by_the_cpu(
    made: Path,
    project: Project,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    embed = module.embed_splits

    def fails_on_gpu(settings: module.EmbedSettings, watch: object) -> None:
        work = tmp_path / "submission_work"
        tries = {path.parent.name for path in work.glob(f"*/*/{settings.config}")}
        assert tries <= {"killed"}, "a failed try fills the disk"
        if settings.device == "cuda":
            # As of a run that was killed on the CPU and resumes.
            (settings.output_dir.with_name("killed") / settings.config).mkdir(
                parents=True, exist_ok=True
            )
            (settings.output_dir / settings.config).mkdir(parents=True)
            raise UserError("the GPU has fallen off the bus")
        assert tries == {"killed"}
        embed(settings, watch)  # type: ignore[arg-type]

    choose = module.choose_engine
    on_gpu = module.Engine("onnx", "fp32", "cuda", 1)
    monkeypatch.setattr(
        module,
        "choose_engine",
        lambda network, run, device: (
            choose(network, run, device) if device == "cpu" else (on_gpu, [])
        ),
    )
    monkeypatch.setattr(module, "embed_splits", fails_on_gpu)
    output = run(made, project.data, tmp_path / "submission.csv", device="auto")
    assert used(output).startswith("final, with tiny, tiny_b")
    assert "tiny fails on the GPU (the GPU has fallen off the bus)" in capsys.readouterr().err


def test_a_full_disk_is_no_reason_to_try_other_engines(
    made: Path,
    project: Project,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(settings: module.EmbedSettings, watch: object) -> None:
        tried.append((settings.config, settings.batch_size))
        disk = tmp_path / f"full_{len(tried)}"
        with small_disk(disk, "4k"):
            write_text(disk / "shard", "x" * 8192)

    tried: list[tuple[str, int | None]] = []
    on_gpu = module.Engine("onnx", "fp32", "cuda", 1)
    monkeypatch.setattr(module, "choose_engine", lambda *_: (on_gpu, []))
    monkeypatch.setattr(module, "embed_splits", full)
    run(made, project.data, tmp_path / "submission.csv", device="auto")
    assert sorted(tried) == [("tiny", None), ("tiny_b", None)]
    assert "tiny is left out: the disk is full" in capsys.readouterr().err


def test_files_of_somebody_else_in_the_work_folder_stay(
    made: Path, project: Project, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").touch()
    output = run(made, project.data, tmp_path / "submission.csv", work=tmp_path / "mine")
    assert output.is_file()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis"]


def test_the_same_command_after_a_repair_of_the_images_submits_them(
    made: Path, project: Project, dataset: Path, tmp_path: Path
) -> None:
    name = ids_of(dataset)[3]
    rewrite_images(dataset, {name: None})
    output = run(made, dataset, tmp_path / "submission.csv")
    shutil.copyfile(project.data / "test-image.hdf5", dataset / "test-image.hdf5")
    run(made, dataset, output)
    assert read_json(output.with_name("submission.csv.json"))["bundle"]["rows_without_image"] == 0
    whole = run(made, project.data, tmp_path / "whole.csv")
    assert output.read_bytes() == whole.read_bytes()


def test_a_submission_of_other_bytes_than_its_manifest_is_written_again(
    made: Path, project: Project, tmp_path: Path
) -> None:
    """A run may be killed after it has written the manifest."""
    output = run(made, project.data, tmp_path / "submission.csv")
    by_tables = run(made, project.data, tmp_path / "tables.csv", hours=1e-9)
    shutil.copyfile(by_tables, output)
    run(made, project.data, output, hours=1e-9)
    assert "by tables, without images" in used(output)


def test_an_earlier_submission_by_more_networks_stays(
    made: Path, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = run(made, project.data, tmp_path / "submission.csv")
    earlier = output.read_bytes()
    run(made, project.data, output, hours=1e-9)
    assert output.read_bytes() == earlier
    assert "pAUC is" not in capsys.readouterr().err


def test_the_time_to_score_grows_with_the_boosters(
    made: Path, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blend has three times as many as its members by tables, so 2 s are no longer enough."""
    first, *_, fallback = module.open_bundle(made).candidates
    assert first.num_boosters == 3 * fallback.num_boosters
    monkeypatch.setattr(module, "RESERVE", 0.0)
    clock = module.Clock(1.0, started=time.monotonic() - 100)
    settings = SubmitSettings(bundle=made, data=project.data, output=tmp_path / "s.csv")
    test = module.read_test_table(module.Dataset(project.data))
    found = module.Run(settings, module.open_bundle(made), test, clock)._reserve()
    assert found == pytest.approx(300, abs=30)


def test_a_submission_that_cannot_be_written_is_an_error(
    made: Path, project: Project, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "full", "4k"):
        (tmp_path / "full" / "rest").write_bytes(bytes(4096))
        with pytest.raises(UserError, match="the disk is full"):
            run(made, project.data, tmp_path / "full" / "submission.csv")


def test_the_only_dataset_below_a_folder_is_found(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder in .* has a test table .*; give --data"):
        find_data(tmp_path)
    for place in ("a", "b/c/d"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "b/c/d" / "test-metadata.csv").touch()
    assert find_data(tmp_path) == tmp_path / "b/c/d"
    (tmp_path / "a" / "test-metadata.parquet").touch()
    with pytest.raises(UserError, match=r"several folders in .* have a test table"):
        find_data(tmp_path)


def test_a_folder_that_is_no_bundle_is_refused(project: Project, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a bundle; give the folder that `infer bundle`"):
        run(tmp_path, project.data, tmp_path / "submission.csv")


def test_a_file_of_somebody_else_is_not_replaced(
    made: Path, project: Project, tmp_path: Path
) -> None:
    (tmp_path / "submission.csv").write_text("mine")
    with pytest.raises(UserError, match="was not written by this command"):
        run(made, project.data, tmp_path / "submission.csv")
    assert (tmp_path / "submission.csv").read_text() == "mine"


@contextmanager
def started(made: Path, data: Path, output: Path, **env: str) -> Iterator[subprocess.Popen[str]]:
    """Run a bundle's script in a process group of its own; it is killed at the end."""
    flags = ("--data", data, "--output", output, "--quiet", "true")
    with running([sys.executable, str(made / "submit.py"), *map(str, flags)], **env) as process:
        yield process


@pytest.mark.slow
def test_a_gpu_whose_library_does_not_load_is_replaced_by_the_cpu_aloud(
    project: Project, tmp_path: Path
) -> None:
    made = project.bundle(tmp_path / "bundle", cuda="12")
    (tmp_path / "driver").mkdir()
    environment = fake_driver.install(tmp_path / "driver")
    output = tmp_path / "submission.csv"
    with started(made, project.data, output, **environment) as process:
        _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert f"warning: {ON_GPU}" in err
    assert used(output).startswith("final, with tiny, tiny_b")


@pytest.mark.slow
def test_a_killed_run_resumes_and_ends_with_the_same_submission(
    made: Path, project: Project, dataset: Path, tmp_path: Path
) -> None:
    # Several shards, so that a run can be killed between them.
    table = pl.read_csv(dataset / "test-metadata.csv", infer_schema=False)
    with h5py.File(dataset / "test-image.hdf5") as file:
        files = {name: bytes(file[name][()]) for name in file}
    copies = range(300)
    tables = [table.with_columns(pl.col("isic_id") + f"_{copy:03d}") for copy in copies]
    repeated = pl.concat(tables).sort("isic_id")
    repeated.write_csv(dataset / "test-metadata.csv")
    sample = repeated.select("isic_id", target=pl.lit(0.3))
    sample.write_csv(dataset / "sample_submission.csv")
    (dataset / "test-image.hdf5").unlink()
    write_hdf5(
        dataset / "test-image.hdf5",
        {f"{name}_{copy:03d}": data for name, data in files.items() for copy in copies},
    )
    output = tmp_path / "killed" / "submission.csv"
    output.parent.mkdir()
    work = output.with_name("submission_work")
    for number in (1, 2):
        with started(made, dataset, output) as process:
            deadline = time.monotonic() + 200
            while len(list(work.rglob("part-*.parquet"))) < 3 * number:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.02)
        assert "target" in output.read_text()[:20]
        assert len(pl.read_csv(output)) == len(sample)
    with started(made, dataset, output) as process:
        _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    whole = run(made, dataset, tmp_path / "whole.csv")
    assert output.read_bytes() == whole.read_bytes()
