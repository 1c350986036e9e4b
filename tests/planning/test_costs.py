import pytest

from dit_video.models.backbones.dit import DitConfig, JointAttention
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.planning import count_context_weights

SIZES = {"channels": 4, "context_width": 16, "width": 32, "layers": 3, "heads": 2}
KEYS_AND_VALUES = 3 * 2 * 32 * 32


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (DitConfig(**SIZES), KEYS_AND_VALUES),
        (DitConfig(**SIZES, context=JointAttention()), 0),
        (WanDitConfig(**SIZES, text_length=8, mlp_dim=48), KEYS_AND_VALUES),
        (WanDitConfig(**SIZES, text_length=8, mlp_dim=48, image_width=12), 2 * KEYS_AND_VALUES),
    ],
    ids=["cross", "joint", "wan", "wan with images"],
)
def test_maps_of_a_context_are_keys_and_values_of_attention_to_texts_and_images(config, count):
    assert count_context_weights(config) == count
