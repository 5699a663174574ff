from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import baselines
from benchmarks.baselines import BASELINES, Task
from benchmarks.limits import DTYPE_OF_PRECISION
from benchmarks.peers import shared_fields
from benchmarks.settings import PeersSettings
from benchmarks.untrained import create_untrained, least_cosine
from isic.dataset import Dataset


@pytest.mark.slow
@pytest.mark.parametrize(
    ("peer", "precision"),
    [
        ("timm eager + DataLoader", "fp32"),
        ("timm eager + DataLoader", "bf16"),
        ("ONNX Runtime loop, h5py + PIL", "fp16"),
    ],
)
def test_a_peer_computes_in_the_precision_that_its_row_names(
    peer: str,
    precision: str,
    tiny_80: Path,
    small_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU, which has all three types too."""
    settings = PeersSettings(config=str(tiny_80), data=small_dataset, num_workers=0, device="cpu")
    untrained = create_untrained(str(tiny_80))
    ids = Dataset(small_dataset).metadata("train")["isic_id"].to_list()[:4]
    common = shared_fields(untrained, ids, settings, tmp_path)
    dtypes: set[torch.dtype] = set()

    def watched(task: Task) -> Any:
        model = real(task)
        model.blocks[0].attn.qkv.register_forward_hook(
            lambda module, images, output: dtypes.add(output.dtype)
        )
        return model

    real = baselines._timm_model
    task = Task(baseline=peer, folder=str(tmp_path), precision="fp32", **common)
    expected = baselines.timm_eager(task)(small_dataset)
    monkeypatch.setattr(baselines, "_timm_model", watched)
    task = Task(baseline=peer, folder=str(tmp_path), precision=precision, **common)
    features = BASELINES[peer](task)(small_dataset)
    assert dtypes == {DTYPE_OF_PRECISION[precision]}
    assert features.dtype == np.float32
    assert least_cosine(expected, features) > 0.999
    assert np.array_equal(expected, features) == (precision == "fp32")
