"""A fitted ensemble on a dataset with markup in its texts, and its reports."""

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from infer.embedding.store import scan_embeddings, shard_path, write_shard
from infer.ensemble.fit import fit_ensemble
from infer.report.cases import worst_misses
from infer.report.write import write_report
from isic.dataset import Dataset
from tests.support.datasets import jpeg, write_hdf5
from tests.support.ensembles import fit_settings, write_dataset, write_embeddings

NASTY = "<script>alert(1)</script>\"'&amp;<img src=x onerror=alert(2)>"


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables without images, with markup in their texts."""
    root = write_dataset(tmp_path_factory.mktemp("report") / "data")
    file = root / "train-metadata.csv"
    table = pl.read_csv(file, infer_schema=False)
    table.with_columns(pl.lit(NASTY).alias("iddx_full"), pl.col("patient_id") + "<b>").write_csv(
        file
    )
    return root


@pytest.fixture(scope="package")
def embeddings(data: Path) -> Path:
    root = write_embeddings(data.parent / "embeddings" / "tiny", data)
    rng = np.random.default_rng(0)
    for (fold,), rows in (
        scan_embeddings(root, "train", ["logit"]).collect().group_by("fold", maintain_order=True)
    ):
        features = rng.standard_normal((len(rows), 8)).astype(np.float16)
        logits = rows["logit"].to_numpy()
        write_shard(
            shard_path(root, "train", int(str(fold)), 0),
            rows["isic_id"].to_list(),
            features,
            logits,
        )
    return root


@pytest.fixture(scope="package")
def fitted(data: Path, embeddings: Path) -> Path:
    chosen = {"features": "multimodal", "embeddings": embeddings, "seeds": 2}
    return fit_ensemble(fit_settings(data, data.parent, name="a <i>&amp;", **chosen))


@pytest.fixture(scope="package")
def page(fitted: Path, data: Path, embeddings: Path) -> str:
    return write_report(fitted, data, [embeddings]).read_text()


@pytest.fixture(scope="package")
def oof(fitted: Path, data: Path) -> pl.DataFrame:
    patients = Dataset(data).metadata("train").select("isic_id", "patient_id")
    return pl.read_parquet(fitted / "oof.parquet").join(
        patients, on="isic_id", maintain_order="left"
    )


@pytest.fixture(scope="package")
def with_images(data: Path, embeddings: Path, fitted: Path, oof: pl.DataFrame) -> Path:
    """The report of a dataset with images: the worst miss has none, the next one is cut short."""
    ids = oof["isic_id"].to_list()
    absent, cut = (
        case.lesion.name for case in worst_misses(oof, Dataset(data).metadata("train"), 2)
    )
    files = {name: jpeg(40 + row % 30, seed=row) for row, name in enumerate(ids) if name != absent}
    files[cut] = files[cut][: len(files[cut]) // 2]
    root = data.parent / "with_images"
    root.mkdir()
    (root / "train-metadata.csv").write_bytes((data / "train-metadata.csv").read_bytes())
    write_hdf5(root / "train-image.hdf5", files)
    return write_report(Path(shutil.copytree(fitted, data.parent / "copy")), root, [embeddings])
