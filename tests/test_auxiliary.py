"""Auxiliary targets from the flag to the columns of embeddings, through real artifacts."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import polars as pl
import pytest

from infer import load_embedder
from infer.embedding.store import read_run, scan_embeddings
from infer.engines import load
from isic import schema
from isic.dataset import Dataset
from isic.metrics import roc_auc
from isic.preprocess import PreprocessSpec
from tests.support.commands import TINY, Cli, run_module
from tests.support.datasets import jpeg, small_table, write_hdf5
from tests.support.fake_run import embed_flags

pytestmark = pytest.mark.slow

AUX = {"dark": "iddx_full ~ melanoma", "seen": "lesion_id"}
COLUMNS = ["aux.dark", "aux.seen"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 training images, dark with a melanoma, and 10 test images without columns of targets."""
    folder = tmp_path_factory.mktemp("data")
    table = small_table()
    dark = pl.col("target") == 1
    table.with_columns(
        iddx_full=pl.when(dark).then(pl.lit("Malignant::Melanoma")).otherwise(pl.lit("Benign")),
        lesion_id=pl.when(pl.int_range(60) % 4 == 0).then(pl.col("isic_id")),
    ).write_csv(folder / "train-metadata.csv")
    rows = table.select("isic_id", "target").rows()
    write_hdf5(
        folder / "train-image.hdf5",
        {name: jpeg(40 + row, 90 if y else 180) for row, (name, y) in enumerate(rows)},
    )
    ids = [f"ISIC_9{row:06d}" for row in range(10)]
    pl.DataFrame({"isic_id": ids}).write_csv(folder / "test-metadata.csv")
    greys = [90 if row % 2 else 180 for row in range(10)]
    write_hdf5(
        folder / "test-image.hdf5",
        {name: jpeg(50, grey) for name, grey in zip(ids, greys, strict=True)},
    )
    return folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folds with a mapping of targets in their config, exported."""
    folder = tmp_path_factory.mktemp("runs")
    lines = [f"  {name}: {definition}\n" for name, definition in AUX.items()]
    config = folder / "tiny.yaml"
    config.write_text("".join(["model: test_vit\naux:\n", *lines, "aux_weight: 1\n"]))
    where = ("--data", data, "--output_dir", folder, "--num_folds", 2)
    more = "--epochs 10 --batch_size 16 --lr 3e-3 --lr_backbone 3e-3"
    run_module("train", *TINY, "--config", config, *where, *more.split())
    run_module("export", "--config", "tiny", "--model_dir", folder / "tiny")
    return folder / "tiny"


@pytest.fixture(scope="module")
def embeddings(run: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings of both splits."""
    output = tmp_path_factory.mktemp("embeddings")
    run_module("infer", *embed_flags(run, data, output, "--dtype", "float32"))
    return output / "tiny"


def test_the_graph_has_one_more_output(run: Path) -> None:
    graph = onnx.load(run / "fold_0" / "model.onnx")
    outputs = {
        value.name: [size.dim_value for size in value.type.tensor_type.shape.dim[1:]]
        for value in graph.graph.output
    }
    assert outputs == {"features": [64], "logits": [1], "aux": [2]}
    labels = json.loads({prop.key: prop.value for prop in graph.metadata_props}["labels"])
    assert labels == {"logits": ["malignant"], "aux": list(AUX)}
    manifest = json.loads((run / "fold_0" / "model.onnx.json").read_text())
    assert list(manifest["aux"].items()) == list(AUX.items())
    assert manifest["parity"]["batch_2"]["max_aux_error"] < 1e-3


def test_embeddings_have_the_logits_of_out_of_fold_rows(run: Path, embeddings: Path) -> None:
    summary = read_run(embeddings, "train")
    assert summary["aux"] == AUX
    found = scan_embeddings(embeddings, "train", ["logit", *COLUMNS]).collect()
    oof = pl.concat([pl.read_parquet(run / f"fold_{fold}" / "oof.parquet") for fold in range(2)])
    both = found.join(oof, on=["isic_id", "fold"], suffix=".oof")
    assert len(both) == 60
    for column in ("logit", *COLUMNS):
        assert both.schema[column] == pl.Float32
        np.testing.assert_allclose(both[column], both[f"{column}.oof"], atol=1e-4)
    assert roc_auc(both["target"], both["aux.dark"]) > 0.9
    test = scan_embeddings(embeddings, "test", COLUMNS).collect()
    assert len(test) == 20, "a row per image and fold, although the test table has no targets"
    dark = test["isic_id"].str.tail(1).cast(pl.Int64) % 2
    assert roc_auc(dark, test["aux.dark"]) > 0.9


def test_the_columns_are_the_outputs_of_the_engine(run: Path, data: Path, embeddings: Path) -> None:
    table = scan_embeddings(embeddings, "test", ["features", "logit", *COLUMNS]).collect()
    manifest = json.loads((run / "fold_1" / "model.onnx.json").read_text())
    rows = table.filter(pl.col("fold") == 1)
    spec = PreprocessSpec(**manifest["preprocess"])
    images, _ = Dataset(data).images("test").load(rows[schema.ID].to_list(), spec)
    features, logits, aux = load(run / "fold_1" / "model.onnx", "cpu").run(images)
    np.testing.assert_array_equal(np.stack(rows["features"].to_numpy()), features)
    np.testing.assert_array_equal(rows["logit"], logits[:, 0])
    np.testing.assert_array_equal(rows.select(COLUMNS).to_numpy(), aux)


def test_a_resumed_run_and_several_processes_give_the_same_bytes(
    run: Path, data: Path, embeddings: Path, tmp_path: Path, cli: Cli
) -> None:
    copy = Path(shutil.copytree(embeddings, tmp_path / "tiny"))
    lost = copy / "train" / "fold_1" / "part-00000.parquet"
    lost.unlink()
    flags = embed_flags(run, data, tmp_path, "--dtype", "float32")
    assert cli("infer", *flags).code == 0
    several = embed_flags(
        run, data, tmp_path / "two", "--dtype", "float32", "--num_processes", 2, "--split", "train"
    )
    assert cli("infer", *several).code == 0
    whole = (embeddings / "train" / "fold_1" / lost.name).read_bytes()
    assert lost.read_bytes() == whole
    assert (tmp_path / "two" / "tiny" / "train" / "fold_1" / lost.name).read_bytes() == whole


def test_views_are_averaged_on_the_host_as_in_the_graph(
    run: Path, data: Path, tmp_path: Path, cli: Cli
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "tiny"))
    tables = []
    for name in ("host", "graph"):
        if name == "graph":
            ended = cli("export", "--config", "tiny", "--model_dir", copy, "--tta", "flips")
            assert ended.code == 0, ended.err
        flags = ("--split", "test", "--tta", "flips", "--dtype", "float32")
        ended = cli("infer", *embed_flags(copy, data, tmp_path / name, *flags))
        assert ended.code == 0, ended.err
        assert ("flips inside" in ended.out) == (name == "graph")
        tables.append(scan_embeddings(tmp_path / name / "tiny", "test", COLUMNS).collect())
    host, graph = (table.select(COLUMNS).to_numpy() for table in tables)
    np.testing.assert_allclose(host, graph, atol=1e-5)


def test_ensembles_are_fitted_on_embeddings_with_more_columns(
    data: Path, embeddings: Path, tmp_path: Path, cli: Cli
) -> None:
    where = ["--data", data, "--embeddings", embeddings, "--output_dir", tmp_path]
    ended = cli("infer", "fit", *where, "--name", "x", "--features", "image")
    assert ended.code == 0, ended.err


def test_an_embedder_returns_them_by_name(run: Path, data: Path, embeddings: Path) -> None:
    dataset = Dataset(data)
    ids = dataset.metadata("test")["isic_id"].to_list()
    with load_embedder(run) as embedder:
        assert embedder.aux == AUX
        embedded = embedder.embed(dataset.images("test").read(ids))
    for fold, outputs in embedded.by_fold.items():
        rows = scan_embeddings(embeddings, "test", COLUMNS, fold).collect()
        assert rows["isic_id"].to_list() == ids
        for name in AUX:
            np.testing.assert_array_equal(outputs.aux[name], rows[f"aux.{name}"])
    by_fold = [outputs.aux["dark"] for outputs in embedded.by_fold.values()]
    np.testing.assert_allclose(embedded.aux["dark"], np.mean(by_fold, axis=0), rtol=1e-6)
