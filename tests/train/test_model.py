from pathlib import Path

import pytest
import torch

from isic.runtime.config import CONFIG_DIR
from isic.runtime.errors import UserError
from tests.support.commands import tiny_settings
from tests.support.training import random_batch
from train.config import TrainSettings, load_settings
from train.model import Classifier, MultiTask, create_model, preprocess_spec

FEATURES = {
    "convnext_tiny": 768,
    "convnext_base": 1024,
    "convnextv2_nano": 640,
    "eva02_small_336": 384,
    "vit_tiny": 192,
    "vit_small": 384,
    "vit_base": 768,
    "eva02_small": 384,
    "eva02_base": 768,
    "eva02_production": 768,
}


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIG_DIR.glob("*.yaml")))
def test_every_config_builds_its_backbone(name: str) -> None:
    settings = load_settings(TrainSettings, {"config": name})
    assert settings.name == name
    assert settings.run_dir == Path("outputs") / name
    with torch.device("meta"):
        model = create_model(settings, pretrained=False)
    assert model.num_features == FEATURES.get(name, model.num_features)


def test_features_and_logits_have_the_contracts_shapes() -> None:
    for name, size in (("test_vit", 32), ("test_convnext", 40)):
        model = create_model(tiny_settings(model=name, image_size=size)).eval()
        with torch.inference_mode():
            features, logits = model(torch.zeros(3, size, size, 3, dtype=torch.uint8))
        assert features.shape == (3, model.num_features)
        assert logits.shape == (3, 1)
        assert features.dtype == logits.dtype == torch.float32


def test_the_model_normalises_by_its_spec() -> None:
    settings = tiny_settings()
    model, spec = create_model(settings).eval(), preprocess_spec(settings)
    image = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    by_hand = ((image / 255 - torch.tensor(spec.mean)) / torch.tensor(spec.std)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        torch.testing.assert_close(model(image)[0], model.backbone(by_hand), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "size", "stride"),
    [("test_vit", 32, 2), ("test_efficientnet", 64, 2), ("eva02_tiny_patch14_224", 56, 2)],
)
def test_a_mask_comes_third_and_the_rest_stays(name: str, size: int, stride: int) -> None:
    model = create_model(tiny_settings(model=name, image_size=size, mask_weight=1.0)).eval()
    assert isinstance(model, MultiTask)
    assert model.mask_stride == stride
    images = random_batch(2, size).images
    with torch.inference_mode():
        features, logits, mask = model(images)
        torch.testing.assert_close(features, model.backbone(model.normalised(images)))
    assert logits.shape == (2, 1)
    assert mask.shape == (2, size // stride, size // stride)
    assert mask.min() >= 0
    assert mask.max() <= 1


@pytest.mark.parametrize("masks", [False, True])
def test_auxiliary_logits_come_third_and_the_rest_stays(masks: bool) -> None:
    values = {"model": "test_efficientnet", "image_size": 64, "mask_weight": float(masks)}
    plain, model = (
        create_seeded(tiny_settings(**values, aux=aux)) for aux in ("", "a: x; b: y; c: z")
    )
    assert set(model.state_dict()) - set(plain.state_dict()) == {
        "aux_head.1.weight",
        "aux_head.1.bias",
    }
    assert set(plain.state_dict()) < set(model.state_dict())
    names = ("features", "logits", "aux", "mask") if masks else ("features", "logits", "aux")
    assert model.output_names == names
    assert plain.output_names == tuple(name for name in names if name != "aux")
    plain.load_state_dict(model.state_dict(), strict=False)
    images = random_batch(2, 64).images
    with torch.inference_mode():
        outputs, others = model(images), plain(images)
    aux = dict(zip(names, outputs, strict=True))["aux"]
    assert aux.shape == (2, 3)
    assert aux.dtype == torch.float32
    for one, two in zip(outputs[:2] + outputs[3:], others, strict=True):
        assert torch.equal(one, two)
    assert [type(head).__name__ for head in model.heads] == (
        ["Sequential", "Sequential", "MaskDecoder"] if masks else ["Sequential", "Sequential"]
    )


def create_seeded(settings: TrainSettings) -> Classifier:
    torch.manual_seed(0)
    return create_model(settings).eval()


def test_the_initial_weights_of_the_other_layers_stay() -> None:
    plain, model = (create_seeded(tiny_settings(aux=aux)) for aux in ("", "a: x"))
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])


@pytest.mark.parametrize("values", [{}, {"mask_weight": 1.0}, {"aux": "a: x; b: y"}])
def test_an_exported_graph_has_no_autocast(values: dict[str, float]) -> None:
    model = create_model(tiny_settings(**values)).eval()
    program = torch.export.export(model, (random_batch(2).images,), strict=False)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.linear.default" in names
    assert not any("autocast" in name or "wrap" in name for name in names), names


@pytest.mark.parametrize(
    "name",
    [
        "test_mambaout",
        "mobilenetv3_small_050",
        "repghostnet_050",
        "xcit_nano_12_p16_224",
        "test_resnet",
    ],
)
def test_backbones_of_many_kinds(name: str) -> None:
    """Some heads change the width, some lack stochastic depth, one's patch size is a number."""
    model = create_model(tiny_settings(model=name, image_size=64)).eval()
    with torch.inference_mode():
        features, logits = model(torch.zeros(2, 64, 64, 3, dtype=torch.uint8))
    assert features.shape == (2, model.num_features)
    assert logits.shape == (2, 1)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"model": "repghostnet_050", "drop_path_rate": 0.1},
            "repghostnet_050 has no stochastic depth; set --drop_path_rate 0",
        ),
        (
            {"model": "crossvit_tiny_240"},
            r"crossvit_tiny_240 does not take images of 64 px \(.*\); --image_size 240 fits",
        ),
        ({"model": "test_maxvit", "image_size": 100}, "does not take images of 100 px .*divisible"),
        (
            {"model": "test_vit", "image_size": 40},
            r"divisible by patch size \(16\)\); --image_size 32",
        ),
        ({"model": "test_convnext", "global_pool": "token"}, "does not pool by token"),
        ({"model": "test_vit_relpos", "global_pool": "max"}, "does not pool by max"),
        (
            {"model": "crossvit_tiny_240", "image_size": 240, "mask_weight": 1},
            "no feature maps to predict masks from",
        ),
        (
            {"model": "test_convnext", "image_size": 80, "mask_weight": 1},
            "test_convnext does not predict masks of images of 80 px .*; --image_size 64 fits",
        ),
        ({"model": "dla34", "grad_checkpointing": True}, "cannot recompute activations"),
        (
            {"model": "test_resnet", "image_size": 32, "batch_size": 1},
            "one image of 32 px at a time",
        ),
        (
            {"model": "convnext_tiny_in22ft1k"},
            'timm calls "convnext_tiny_in22ft1k" "convnext_tiny.fb_in22k_ft_in1k" now',
        ),
        (
            {"model": "test_vit.r160_in1kk", "pretrained": True},
            r"no weights .* known tags are: r160_in1k; --model test_vit takes the default",
        ),
    ],
)
def test_a_backbone_that_does_not_fit_is_refused_for_the_true_reason(
    values: dict[str, object], words: str
) -> None:
    with pytest.raises(UserError, match=words) as refused:
        create_model(tiny_settings(**{"image_size": 64, **values}))
    assert "\n" not in str(refused.value)
