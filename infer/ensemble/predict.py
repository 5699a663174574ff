"""Score the test table with a fitted ensemble and write the submission. Nothing is fitted here."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from infer.ensemble.artifact import ENSEMBLE_FILE
from infer.ensemble.blends.artifact import Blend, Scorer, ensembles_of, open_scorer, out_of_fold
from infer.ensemble.blends.ranks import Scores
from infer.ensemble.boosting.refit import ESTIMATES, choose_rows
from infer.ensemble.drift import drift_warning, measure_drift
from infer.ensemble.features.own_tables import OwnTable, read_test_tables
from infer.ensemble.score_table import TableScores, score_table
from infer.ensemble.scoring.calibration import shift_prevalence
from infer.ensemble.settings import EmbeddingSources, PredictSettings, ScoreSettings
from infer.ensemble.two_sample import TwoSample, compare_tables
from isic import schema
from isic.dataset import Dataset
from isic.metadata import read_ids, read_metadata
from isic.runtime.errors import UserError, warn
from isic.runtime.files import (
    atomic_path,
    holds,
    manifest_path,
    refuse_foreign,
    sha256,
    versions,
    write_manifest,
)
from isic.runtime.only_writer import only_writer
from isic.tables import write_parquet


@dataclass(frozen=True, eq=False)
class TestTable:
    """The rows to score, and the order of the submission."""

    dataset: Dataset
    path: Path
    metadata: pl.DataFrame
    """[N] the table, in its own order."""
    order: pl.DataFrame
    """[N] `isic_id` in the order of the submission."""
    _told_apart: dict[tuple[str, ...], TwoSample | None] = field(default_factory=dict)

    @cached_property
    def sha256(self) -> str:
        return sha256(self.path)

    @cached_property
    def training_sha256(self) -> str | None:
        """The digest of the dataset's training table, if it has one."""
        path = self.dataset.metadata_path("train")
        return sha256(path) if path.is_file() else None

    def told_apart(self, names: tuple[str, ...]) -> TwoSample | None:
        """Compare columns with those of the training table, see `compare_tables`."""
        if names not in self._told_apart:
            training = self.dataset.metadata("train")
            self._told_apart[names] = compare_tables(training, self.metadata, names)
        return self._told_apart[names]


def read_test_table(dataset: Dataset) -> TestTable:
    """Read the test split's table and the sample submission, if there is one.

    Raises:
        UserError: the table is missing or malformed, or the sample has other ids.
    """
    path = dataset.metadata_path("test")
    metadata = read_metadata(path)
    return TestTable(dataset, path, metadata, submission_order(dataset, metadata))


def predict_submission(settings: PredictSettings) -> None:
    """Run `infer predict`, which its settings describe."""
    scorer = choose_models(open_scorer(settings.ensemble), settings, settings.sources)
    test = read_test_table(Dataset(settings.data))
    refuse_foreign_submission(settings.output)
    own_tables = read_test_tables(settings.tables, scorer.own_tables)
    found = score_rows(scorer, settings, settings.sources, test.metadata, own_tables, test.path)
    origins = {
        "tables": {name: sha256(own.path) for name, own in own_tables.items()},
        "rows": settings.rows,
        "prevalence": settings.prevalence,
        "out_of_fold_scores": ESTIMATES[settings.rows],
    }
    drift = drift_of(scorer, test, found.score, found.own)
    with only_writer(settings.output):
        write_submission(settings.output, test, scorer, found, origins, drift)
    print(
        f"submission: {settings.output} ({len(found.score)} rows, "
        f"scores {found.score.min():.4f} to {found.score.max():.4f})"
    )
    warn_of_drift(drift, settings.output)


def choose_models(scorer: Scorer, settings: ScoreSettings, sources: EmbeddingSources) -> Scorer:
    """Return the ensemble with the models that score rows by the settings.

    Raises:
        UserError: it lacks models or probabilities that the settings need, or the embeddings are
            not those that it needs.
    """
    scorer = choose_rows(scorer, settings.rows, sources)
    if settings.prevalence and not scorer.calibration:
        raise UserError(
            f"--prevalence is for probabilities, and {scorer.root} has none; fit or blend it again "
            "with --calibrate"
        )
    return scorer


def score_rows(
    scorer: Scorer,
    settings: ScoreSettings,
    sources: EmbeddingSources,
    metadata: pl.DataFrame,
    own_tables: Mapping[str, OwnTable],
    source: Path,
) -> TableScores:
    """Score the rows of a table by the settings. Raise UserError as `score_table` does.

    Args:
        scorer: the result of `choose_models`.
        source: the table's path, for messages.
    """
    found = score_table(
        scorer, metadata, sources, own_tables, settings.num_threads, settings.few, source
    )
    if settings.prevalence:
        found = with_prevalence(found, scorer, settings.prevalence)
    num_few = int(found.is_few.sum())
    if num_few:
        print(f"{num_few:,} rows of patients with few lesions are scored by raw features")
    return found


def with_prevalence(found: TableScores, scorer: Scorer, prevalence: float) -> TableScores:
    """Return the scores with probabilities for another share of malignant lesions."""
    calibration = scorer.calibration
    assert calibration and found.probability is not None
    shifted = shift_prevalence(found.probability, calibration.prevalence, prevalence)
    return replace(found, probability=shifted)


def write_submission(
    output: Path,
    test: TestTable,
    scorer: Scorer,
    found: TableScores,
    facts: Mapping[str, Any],
    drift: pl.DataFrame | None,
) -> None:
    """Write a submission, the scores of each model, the drift from training, and a manifest.

    Args:
        output: the submission's path.
        test: the rows.
        scorer: the ensemble that scored them.
        found: the scores, in the order of the table.
        facts: more fields of the manifest.
        drift: the result of `drift_of`; if None, an earlier table, of other rows, is removed.
    """
    scored = test.metadata.select(schema.ID, pl.Series(schema.TARGET, found.score))
    submission = test.order.join(scored, on=schema.ID, maintain_order="left")
    all_models = test.metadata.select(schema.ID).with_columns(
        **found.models, blend=found.score, **_extra_columns(found)
    )
    models_file = models_path(output)
    with ExitStack() as files:
        submission_path, models_temporary = (
            files.enter_context(atomic_path(path)) for path in (output, models_file)
        )
        if drift is not None:
            write_parquet(files.enter_context(atomic_path(drift_path(output))), drift)
        submission.write_csv(submission_path)
        write_parquet(models_temporary, all_models)
        # The manifest comes before the files get their names: it shows that they are this
        # command's own, so a run that is killed in between can be repeated.
        write_manifest(
            output,
            submission_path,
            ensemble=sha256(scorer.root / ENSEMBLE_FILE),
            folds_digest=scorer.manifest["folds_digest"],
            **_describe(scorer),
            **found.origins,
            metadata_sha256=test.sha256,
            **facts,
            models={"file": models_file.name, "sha256": sha256(models_temporary)},
            versions=versions("isic-toolkit", *scorer.manifest["versions"]),
        )
    if drift is None:
        drift_path(output).unlink(missing_ok=True)


def drift_of(
    scorer: Scorer, test: TestTable, score: Scores, own: pl.DataFrame | None = None
) -> pl.DataFrame:
    """Return the differences of rows and their scores from training, see `measure_drift`.

    With the training table beside the rows, those that a classifier finds are measured too.

    Args:
        own: [N] the own columns, as of `TableScores`, if they are to be compared.
    """
    summary = scorer.training
    # Another table would be no measure of the training rows.
    is_known = test.training_sha256 == ensembles_of(scorer)[0].manifest["metadata_sha256"]
    together = test.told_apart(tuple(summary)) if is_known else None
    table = test.metadata.with_columns([] if own is None else own.get_columns())
    return measure_drift(summary, table, out_of_fold(scorer), score, together)


def warn_of_drift(drift: pl.DataFrame, output: Path) -> None:
    """Warn in one line if the rows of a submission differ from those of training."""
    warning = drift_warning(drift)
    if warning:
        warn(f"{warning}; see {drift_path(output)}")


def _extra_columns(found: TableScores) -> dict[str, pl.Series]:
    """Return `std` and `probability`, those that the ensemble has."""
    columns = {"std": found.std, "probability": found.probability}
    return {
        name: pl.Series(name, values, nan_to_null=True)
        for name, values in columns.items()
        if values is not None
    }


def _describe(scorer: Scorer) -> dict[str, Any]:
    """Return the manifest's field on the features, or on the members and weights of a blend."""
    keys = ("members", "weights") if isinstance(scorer, Blend) else ("features",)
    return {key: scorer.manifest[key] for key in keys}


def refuse_foreign_submission(output: Path) -> None:
    """Raise a UserError if a file would be replaced that `infer predict` did not write."""
    manifest = manifest_path(output)
    is_own = holds(manifest, "artifact", "ensemble", "models")
    files = [output, models_path(output), drift_path(output), manifest]
    refuse_foreign(files, is_own, "--output")


def models_path(submission: Path) -> Path:
    """Return the path of `submission_models.parquet`.

    It has `isic_id`, each model's probabilities, `blend` (the submission's scores), their `std`
    over folds and seeds, and with a calibrated ensemble `probability`.
    """
    return submission.with_name(f"{submission.stem}_models.parquet")


def drift_path(submission: Path) -> Path:
    """Return the path of the differences from training: `submission_drift.parquet`."""
    return submission.with_name(f"{submission.stem}_drift.parquet")


def submission_order(dataset: Dataset, metadata: pl.DataFrame) -> pl.DataFrame:
    """Return the ids in the order of the sample submission, or of the table if there is none.

    Raises:
        UserError: the sample and the table do not have the same ids.
    """
    path = dataset.sample_submission_path
    if not path.is_file():
        return metadata.select(schema.ID)
    order = read_ids(path).to_frame()  # the sample's target is a placeholder such as 0.3
    table = str(dataset.metadata_path("test"))
    _refuse_extra(order, metadata, str(path), table, path.name)
    _refuse_extra(metadata, order, table, str(path), path.name)
    return order


def _refuse_extra(
    ids: pl.DataFrame, others: pl.DataFrame, source: str, other_source: str, sample: str
) -> None:
    """Raise a UserError if some ids are not among the others."""
    extra = ids.join(others, on=schema.ID, how="anti", maintain_order="left")[schema.ID]
    if len(extra):
        raise UserError(
            f"{len(extra)} of the {len(ids)} ids in {source} are not in {other_source}, the first "
            f"is {extra[0]}; use the sample submission of this dataset, or remove {sample}"
        )
