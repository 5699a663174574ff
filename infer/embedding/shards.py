"""Cut the ids of a split into shards, and run those that are missing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from infer.embedding.store import EmbeddedSplit, shard_path
from isic import schema
from isic.folds import Folds
from isic.layout import Fold
from isic.runtime.errors import UserError
from isic.tables import read_parquet

SHARD_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Shard:
    """Ids that are embedded and written together, by the models of one or several folds."""

    ids: pl.Series
    """[N] String."""
    paths: dict[Fold, Path]
    """The file to write, by fold."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def errors_path(self) -> Path:
        """The shard's bad images, stored here until the whole run is done and collects them."""
        first, *_ = self.paths.values()
        return first.with_name(first.name.replace("part-", "errors-"))

    @property
    def is_done(self) -> bool:
        return all(path.is_file() for path in self.paths.values())

    def read_bad(self) -> list[tuple[str, str]]:
        """Read the id and reason of each bad image of a finished shard."""
        return read_parquet(self.errors_path).rows() if self.errors_path.is_file() else []


def plan_shards(
    root: Path,
    split: EmbeddedSplit,
    ids: pl.Series,
    fold_ids: Sequence[Fold],
    folds: Folds | None,
    folds_mode: str,
) -> list[Shard]:
    """Cut a split into shards of at most SHARD_ROWS ids, in the table's order.

    Args:
        fold_ids: the folds that have a model.
        folds: the fold plan; None unless the split is train.
        folds_mode: `oof` embeds an image with the fold that held it out, `all` with every fold.
    """
    if folds is None or folds_mode == "all":
        groups = [(list(fold_ids), ids)]
    else:
        held_out_by = fold_of(ids, folds)
        groups = [([k], ids.filter(held_out_by == k)) for k in fold_ids]
    # The same cut whatever shards exist, so that a resumed run finds its files.
    shards = []
    for embedded_by, rows in groups:
        for index, start in enumerate(range(0, len(rows), SHARD_ROWS)):
            paths = {k: shard_path(root, split, k, index) for k in embedded_by}
            shards.append(Shard(rows.slice(start, SHARD_ROWS), paths))
    return shards


def fold_of(ids: pl.Series, folds: Folds) -> pl.Series:
    """Return [N] the fold of each id, as `Folds.of` does in ten times the memory."""
    known = folds.table[schema.ID]
    position = known.search_sorted(ids).clip(upper_bound=len(known) - 1)
    if (known.gather(position) == ids).all():
        return folds.table["fold"].gather(position)
    # The table is not sorted or lacks an id; `of` handles the first and reports the second.
    return folds.of(ids.to_frame(schema.ID))


def run_missing_shards(shards: Sequence[Shard], run: Callable[[list[Shard]], None]) -> None:
    """Run the missing shards until none is left.

    Raises:
        UserError: a whole round finished no shard.
    """
    # Several rounds, because a lost worker leaves its shards missing.
    due = [shard for shard in shards if not shard.is_done]
    while due:
        run(due)
        left = [shard for shard in due if not shard.is_done]
        if len(left) == len(due):
            raise UserError(
                f"every worker was lost before it finished one of {len(due)} shards; see their "
                "messages above, and try fewer --num_processes or a smaller --batch_size"
            )
        due = left
