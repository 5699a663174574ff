"""Score tables from Python with a fitted ensemble or blend."""

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, get_args

import polars as pl

from infer.embedding.outputs import EmbeddedImages, NamedOutputs
from infer.embedding.store import Embeddings, read_run
from infer.ensemble.blends.artifact import (
    Scorer,
    columns_of,
    ensembles_of,
    needed_part,
    open_scorer,
)
from infer.ensemble.blends.ranks import Scores
from infer.ensemble.boosting.refit import Rows, choose_rows
from infer.ensemble.features.own_tables import check_test_tables
from infer.ensemble.score_table import score_table
from infer.ensemble.settings import EmbeddingSources, Few
from isic import schema
from isic.metadata import check_metadata
from isic.runtime.errors import UserError, did_you_mean, issue_warnings


class PandasFrame(Protocol):
    """The part of a pandas DataFrame that is read; pandas itself is not needed."""

    @property
    def columns(self) -> Iterable[Any]: ...

    def __getitem__(self, name: Any) -> Any: ...


Table = pl.DataFrame | PandasFrame
NetworkOutputs = Mapping[str, EmbeddedImages | str | PathLike[str]]
"""By network: the result of `ImageEmbedder.embed` for the rows in their order, or the folder of an
embedding run, such as outputs/embeddings/vit_tiny, whose test split has the rows."""


def load_ensemble(path: str | PathLike[str]) -> "FittedEnsemble":
    """Read and check an ensemble or a blend.

    Args:
        path: its folder, or a folder with a single ensemble in it.

    Raises:
        UserError: there is none, or several; a file is missing, changed or of another version.
    """
    return FittedEnsemble(needed_part(open_scorer(Path(path).expanduser())))


class FittedEnsemble:
    """A fitted ensemble, or a blend of some, that scores tables; made by `load_ensemble`."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    @property
    def needed_columns(self) -> list[str]:
        """The metadata columns that the features read, in addition to `isic_id`."""
        return columns_of(self._scorer)

    @property
    def embeddings(self) -> list[str]:
        """The networks of `score(embeddings=...)`."""
        return self._networks("embeddings")

    @property
    def frozen(self) -> list[str]:
        """The networks of `score(frozen=...)`."""
        return self._networks("frozen")

    @property
    def tables(self) -> list[str]:
        """The names of the tables of own columns that the rows to score need too."""
        return list(self._scorer.own_tables)

    def _networks(self, flag: str) -> list[str]:
        ensembles = ensembles_of(self._scorer)
        return sorted({name for ensemble in ensembles for name in ensemble.manifest[flag]})

    def score(
        self,
        metadata: Table,
        *,
        embeddings: NetworkOutputs | None = None,
        frozen: NetworkOutputs | None = None,
        tables: Mapping[str, Table] | None = None,
        few: Few = "warn",
        rows: Rows = "folds",
        num_threads: int = 0,
    ) -> Scores:
        """Return [N] float64 the scores of N lesions in [0, 1], in the order of `metadata`.

        They are those of `infer predict` for the same rows and embeddings. The keywords have the
        meaning and the values of its flags. Features relative to a patient compare the lesions of
        this call, so give all lesions of a patient at once.

        Args:
            metadata: a polars or pandas DataFrame with `isic_id` and `needed_columns`.
            embeddings: outputs by network, of the networks that the ensemble was fitted with.
            frozen: outputs by frozen network.
            tables: the tables of own columns by name, with the rows to score.
            few: for patients with fewer lesions than nearly all in training: `warn`, `refuse`, or
                `raw`, by the members of a blend that do not compare lesions.
            rows: `folds`, or `all` for the models that were fitted on every row.
            num_threads: 0 for all cores.

        Raises:
            UserError: a column or a network is missing, or is another one than in the fit.

        Warns:
            ResultWarning: rows were in the fit, patients have few lesions, or categories that no
                training row has.
        """
        for name, value, known in (("few", few, Few), ("rows", rows, Rows)):
            if value not in get_args(known):
                raise UserError(f'{name} is "{value}", {did_you_mean(str(value), get_args(known))}')
        with issue_warnings():
            table = check_metadata(_to_polars(metadata))
            ids = table[schema.ID]
            sources = EmbeddingSources(_runs(embeddings or {}, ids), _runs(frozen or {}, ids))
            own = {name: _to_polars(each) for name, each in (tables or {}).items()}
            scorer = choose_rows(self._scorer, rows, sources)
            own_tables = check_test_tables(own, scorer.own_tables)
            return score_table(scorer, table, sources, own_tables, num_threads, few).score


def _runs(outputs: NetworkOutputs, ids: pl.Series) -> tuple[Embeddings, ...]:
    """Return embeddings whose rows have ids. Raise UserError for another network or number."""
    if not isinstance(outputs, Mapping):
        raise UserError('embeddings and frozen are by network, such as {"vit_tiny": embedded}')
    return tuple(_run(name, found, ids) for name, found in outputs.items())


def _run(name: str, found: EmbeddedImages | str | PathLike[str], ids: pl.Series) -> Embeddings:
    run: Embeddings
    if isinstance(found, EmbeddedImages):
        if len(found) != len(ids):
            raise UserError(
                f"{name} has the outputs of {len(found):,} images for {len(ids):,} rows of "
                "metadata; embed one image per row, in the same order"
            )
        run = NamedOutputs(ids, found)
    else:
        run = Path(found).expanduser()
    network = read_run(run, "test")["config"]
    if network != name:
        raise UserError(f"{run} is by the network {network}, not {name}; give it under its name")
    return run


def _to_polars(table: Table) -> pl.DataFrame:
    if isinstance(table, pl.DataFrame):
        return table
    if not (hasattr(table, "columns") and hasattr(table, "notna")):
        raise UserError(f"a table is a polars or pandas DataFrame, not a {type(table).__name__}")
    names = list(map(str, table.columns))
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise UserError(f"a table has two columns called {repeated}; rename one of them")
    # Not polars.from_pandas, which needs pyarrow for texts.
    return pl.DataFrame([_to_series(str(name), table[name]) for name in table.columns])


def _to_series(name: str, column: Any) -> pl.Series:
    """Return a column of pandas with null for each of its missing values."""
    if column.dtype.kind in "iufb":  # numpy's own types, whose only missing value is NaN
        return pl.Series(name, column.to_numpy(), nan_to_null=True)
    values = column.astype(object).where(column.notna(), None).tolist()
    return pl.Series(name, values, strict=False)
