import shutil
from pathlib import Path

import numpy as np
import polars as pl

from infer.embedding.store import shard_path, write_shard
from infer.report.maps import MAX_SHOWN, projections, sample_lesions


def test_a_map_shows_each_fold_its_own_lesions(embeddings: Path, oof: pl.DataFrame) -> None:
    maps = {fold: rows for fold, _, rows in projections(embeddings, oof)}
    assert sorted(maps) == [0, 1, 2]
    for fold, rows in maps.items():
        assert set(rows["isic_id"]) == set(oof.filter(fold=fold)["isic_id"])
    # The boosters may have other folds than the network.
    others = oof.with_columns((2 - pl.col("fold")).alias("fold"))
    for fold, _, rows in projections(embeddings, others):
        assert rows.equals(maps[fold])
    many = pl.DataFrame(
        {
            "isic_id": [f"{row:04d}" for row in range(2000)],
            "target": [row % 2 for row in range(2000)],
        }
    )
    shown = sample_lesions(many)
    assert shown.equals(sample_lesions(many.reverse()))
    assert shown["target"].sum() == MAX_SHOWN[1]
    assert len(shown) == sum(MAX_SHOWN.values())


def test_embeddings_that_overflowed_are_left_out(
    embeddings: Path, oof: pl.DataFrame, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(embeddings, tmp_path / "overflowed"))
    part = shard_path(root, "train", 1, 0)
    table = pl.read_parquet(part)
    features = np.array(table["features"].to_numpy())
    features[0] = np.inf
    write_shard(part, table["isic_id"].to_list(), features, table["logit"].to_numpy())
    maps = {fold: rows for fold, _, rows in projections(root, oof)}
    assert len(maps[1]) == len(table) - 1
    assert table["isic_id"][0] not in maps[1]["isic_id"]
