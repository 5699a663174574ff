"""The whole pipeline on real lesions, from images and metadata to a submission."""

from pathlib import Path

import polars as pl
import pytest

from isic.runtime.files import read_json, sha256
from tests.support.commands import TINY, Cli


@pytest.mark.slow
def test_real_pairs_to_a_submission(real_data: Path, tmp_path: Path, cli: Cli) -> None:
    data, run, embeddings, ensembles = (
        real_data / "real-pairs",
        tmp_path / "tiny",
        tmp_path / "embeddings",
        tmp_path / "ens",
    )
    fit = ["--features", "multimodal", "--seeds", 1, "--num_rounds", 20, "--output_dir", ensembles]
    predict = ["--ensemble", ensembles, "--output", tmp_path / "submission.csv"]
    steps: list[list[object]] = [
        ["train", *TINY, "--data", data, "--output_dir", tmp_path, "--epochs", 1, "--num_folds", 3],
        ["export", "--config", "tiny", "--model_dir", run],
        [
            "infer",
            "embed",
            "--config",
            "tiny",
            "--model_dir",
            run,
            "--data",
            data,
            "--output_dir",
            embeddings,
        ],
        ["infer", "fit", "--data", data, "--embeddings", embeddings / "tiny", *fit],
        ["infer", "predict", "--data", data, "--embeddings", embeddings / "tiny", *predict],
    ]
    for step in steps:
        ended = cli(str(step[0]), *step[1:])
        assert ended.code == 0, ended.err

    submission = pl.read_csv(tmp_path / "submission.csv")
    assert submission.columns == ["isic_id", "target"]
    assert submission["isic_id"].equals(pl.read_csv(data / "sample_submission.csv")["isic_id"])
    assert submission["target"].is_between(0, 1).all()
    assert submission["target"].n_unique() == 3

    # The chain from the submission back to the data.
    chain = read_json(tmp_path / "submission.csv.json")
    engines = {str(fold): sha256(run / f"fold_{fold}" / "model.onnx") for fold in range(3)}
    assert chain["embeddings"]["tiny"]["engines"] == engines
    exported = read_json(run / "fold_0" / "model.onnx.json")
    trained = read_json(run / "fold_0" / "best_model.pth.json")
    assert exported["made_from"]["sha256"] == trained["sha256"]
    assert trained["made_from"]["metadata_sha256"] == sha256(data / "train-metadata.csv")
    assert chain["folds_digest"] == exported["folds_digest"] == trained["folds_digest"]
