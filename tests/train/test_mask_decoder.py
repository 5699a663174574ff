import pytest
import torch

from train.mask_decoder import MaskDecoder, trunk_stride


@pytest.mark.parametrize(("finest", "trunk"), [(2, 2), (4, 4), (16, 4), (14, 2), (7, 7)])
def test_maps_are_summed_at_a_stride_that_divides_theirs(finest: int, trunk: int) -> None:
    assert trunk_stride(finest) == trunk


@pytest.mark.parametrize(
    ("strides", "stride"), [([4, 8, 32], 2), ([16, 16], 2), ([14], 2), ([7], 7)]
)
def test_maps_of_all_strides_become_one_mask(strides: list[int], stride: int) -> None:
    size = 2 * max(strides) * 7
    decoder = MaskDecoder([8] * len(strides), strides)
    maps = [torch.randn(3, 8, size // each, size // each) for each in strides]
    assert decoder.stride == stride
    assert decoder(maps).shape == (3, size // stride, size // stride)
