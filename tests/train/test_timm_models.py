from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from isic.runtime.errors import UserError
from tests.support.commands import TINY, Cli, tiny_settings
from train.model import create_model


@pytest.mark.parametrize("model", ["test_vit", "test_vit2"])
def test_weights_that_do_not_fill_the_backbone_are_refused(tmp_path: Path, model: str) -> None:
    """timm accepts both: a whole checkpoint, with other names, and another model's weights."""
    torch.save(
        {"model_state_dict": create_model(tiny_settings()).state_dict()},
        tmp_path / "best_model.pth",
    )
    save_file(
        timm.create_model("test_efficientnet", num_classes=0).state_dict(),
        tmp_path / "other.safetensors",
    )
    for name in ("best_model.pth", "other.safetensors"):
        with pytest.raises(UserError, match=rf"fills 0 of the \d+ weight matrices of {model}"):
            create_model(tiny_settings(model=model, pretrained=str(tmp_path / name)))


def test_weights_that_cannot_be_loaded_stop_the_run(
    cli: Cli, small_dataset: Path, tmp_path: Path
) -> None:
    absent = tmp_path / "none.safetensors"
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not weights")
    messages = {
        "true": "cannot load the pretrained weights",
        absent: f"no weights at {absent}",
        broken: f"{broken} is not a complete safetensors file",
    }
    for pretrained, message in messages.items():
        flags = ["--data", small_dataset, "--output_dir", tmp_path, "--pretrained", pretrained]
        ended = cli("train", *TINY, *flags)
        assert ended.code == 2
        assert message in ended.err
        assert "--pretrained false" in ended.err


@pytest.mark.parametrize("content", [[1, 2], {1: torch.zeros(2)}, {"state_dict": 3}, sorted, None])
def test_a_file_without_weights_is_refused(content: object, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    if content is not None:
        torch.save(content, path)
    else:
        path.touch()
    with pytest.raises(
        UserError, match="cannot load the pretrained weights of test_vit"
    ) as refused:
        create_model(tiny_settings(pretrained=str(path)))
    assert "\n" not in str(refused.value)


def test_a_local_file_of_weights_is_used(tmp_path: Path) -> None:
    backbone = create_model(tiny_settings()).backbone
    save_file(backbone.state_dict(), tmp_path / "model.safetensors")
    for given in (tmp_path / "model.safetensors", tmp_path):
        loaded = create_model(tiny_settings(pretrained=str(given))).backbone.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in backbone.state_dict().items())


def test_constants_of_the_initialisation_do_not_count_as_unfilled(tmp_path: Path) -> None:
    """A FastViT's layer scales are maps [C, 1, 1] of 1e-5, whose deviation rounds to above 0."""
    settings = tiny_settings(model="fastvit_t8", image_size=64)
    backbone = create_model(settings).backbone
    save_file(backbone.state_dict(), tmp_path / "model.safetensors")
    create_model(settings.model_copy(update={"pretrained": str(tmp_path)}))
