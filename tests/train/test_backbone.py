from pathlib import Path

import timm
import torch

from isic.layout import BEST_CHECKPOINT
from tests.support.commands import tiny_settings
from tests.support.training import random_batch
from train.backbone import model_card
from train.checkpoint import load_checkpoint
from train.model import create_model, preprocess_spec


def test_the_backbone_loads_with_timm_only(trained: Path) -> None:
    folder = trained / "fold_0" / "backbone"
    backbone = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    settings = tiny_settings()
    model = create_model(settings, pretrained=False).eval()
    model.load_state_dict(load_checkpoint(trained / "fold_0" / BEST_CHECKPOINT)["model_state_dict"])
    images = random_batch(3).images
    with torch.inference_mode():
        torch.testing.assert_close(backbone(model.normalised(images)), model(images)[0])
    assert tuple(backbone.pretrained_cfg["mean"]) == preprocess_spec(settings).mean
    again = create_model(tiny_settings(pretrained=str(folder)))
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.backbone.parameters(), backbone.parameters(), strict=True)
    )
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    assert "was held out" in card


def test_the_card_names_a_pipeline_from_a_file_in_one_line() -> None:
    facts = {
        "fold": "all",
        "num_rows": 9,
        "metadata_sha256": "0",
        "folds_digest": "0",
        "pretrained": {"source": "random"},
    }
    pipeline = {"transform": {"transforms": [{"p": 0.25}] * 50}}
    for augmentation, words in (("light", "`light`"), (pipeline, "`a file of digest ")):
        settings = tiny_settings(augmentation=augmentation)
        card = model_card(create_model(settings, pretrained=False), settings, facts)
        assert f"augmentation {words}" in card
        assert "0.25" not in card
