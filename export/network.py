"""The network as artifacts compute it: averaged over views, with features in their stored type."""

import torch
from torch import Tensor, nn

from export.precision import cast_model
from infer.engines.contract import MASK
from isic.views import REVERSED_AXES, VIEWS, View, is_transposed
from train.model import Classifier


class ArtifactNetwork(nn.Module):
    """A classifier whose outputs are the means over the views of each image."""

    def __init__(self, model: Classifier, tta: str) -> None:
        """Wrap a model in eval mode.

        Args:
            model: in the precision of the artifact, see `cast_model`.
            tta: a key of VIEWS.
        """
        super().__init__()
        self.model = model
        self.views = VIEWS[tta]
        self.output_names = model.output_names
        # float16 has more digits than bfloat16; the parity check finds values beyond its range.
        self.features_dtype = torch.float32 if model.dtype == torch.float32 else torch.float16

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return features [N, D], logits [N, 1], any auxiliary logits [N, K] and mask [N, h, w].

        All are float32, but features are float16 if the network computes in low precision.

        Args:
            images: uint8 [N, H, W, 3], RGB.
        """
        maps = self.model.normalised(images)
        outputs = self.model.forward_maps(maps) if len(self.views) == 1 else self.averaged(maps)
        features, *others = outputs
        return features.to(self.features_dtype), *others

    def averaged(self, maps: Tensor) -> tuple[Tensor, ...]:
        """Return the float32 means over the views of maps [N, 3, H, W], from one batch [V N]."""
        stacked = self.model.forward_maps(stack_views(maps, self.views))
        outputs = [out.reshape(len(self.views), -1, *out.shape[1:]) for out in stacked]
        if MASK in self.output_names:
            outputs[-1] = turn_back(outputs[-1], self.views)
        return tuple(out.mean(dim=0) for out in outputs)


def artifact_network(model: Classifier, precision: str, tta: str = "none") -> ArtifactNetwork:
    """Return the network of an artifact; `model` is in eval mode on the CPU, and is not changed."""
    return ArtifactNetwork(cast_model(model, precision), tta)


def stack_views(maps: Tensor, views: tuple[View, ...]) -> Tensor:
    """Return all first views, then all second views and so on, of square maps [N, C, H, H]."""
    transposed = maps.transpose(-2, -1)
    sources = [transposed if is_transposed(view) else maps for view in views]
    return torch.cat([reverse(*pair) for pair in zip(sources, views, strict=True)])


def turn_back(maps: Tensor, views: tuple[View, ...]) -> Tensor:
    """Return maps [V, N, h, h] of the views as maps of the image itself."""
    upright = []
    for row, view in enumerate(views):
        source = reverse(maps[row], view)
        upright.append(source.transpose(-2, -1) if is_transposed(view) else source)
    return torch.stack(upright)


def reverse(maps: Tensor, view: View) -> Tensor:
    """Return maps [..., H, W] with the axes reversed that a view reverses."""
    axes = [axis - 2 for axis in REVERSED_AXES[view]]
    return maps.flip(axes) if axes else maps
