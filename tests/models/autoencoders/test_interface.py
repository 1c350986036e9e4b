"""The interface of all autoencoders, and the sizes of clips and latents."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.core.trees import flatten
from dit_video.models.autoencoders import (
    Autoencoder,
    AutoencoderConfig,
    CausalVaeConfig,
    CodebookConfig,
    ImageLevels,
    ImageVaeConfig,
    InflatedConfig,
    PatchVaeConfig,
    VqConfig,
    latent_grid,
)
from dit_video.nn import get_graph_def, get_param_shapes
from dit_video.tokens import Grid

STRIDE = Grid(4, 8, 16)


def test_latent_sizes_follow_from_the_stride():
    assert latent_grid(Grid(1, 8, 16), STRIDE) == Grid(1, 1, 1)
    assert latent_grid(Grid(81, 480, 832), Grid(4, 8, 8)) == Grid(21, 60, 104)
    # Without temporal stride every length fits.
    assert [latent_grid(Grid(t, 8, 16), Grid(1, 8, 16)).t for t in (1, 2, 3)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (Grid(16, 64, 64), r"T=16 is not 1 \+ 4k for temporal stride 4; use 13 or 17"),
        (Grid(2, 64, 64), "T=2 .*; use 1 or 5"),
        (Grid(0, 64, 64), "T=0 .*; use 1 or 5"),
        (Grid(17, 60, 64), "height 60 is not divisible by the spatial stride 8; use 56 or 64"),
        (Grid(17, 5, 64), "height 5 .*; use 8 or 16"),
        (Grid(17, 0, 64), "height 0 .*; use 8 or 16"),
        (Grid(17, 64, 72), "width 72 is not divisible by the spatial stride 16; use 64 or 80"),
    ],
)
def test_a_size_that_does_not_fit_names_the_rule_the_value_and_the_fix(clip, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        latent_grid(clip, STRIDE)


@pytest.mark.parametrize(
    "clip", [Grid(16, 64, 64), Grid(0, 64, 64), Grid(17, 60, 64), Grid(17, 5, 64), Grid(17, 64, 72)]
)
def test_the_sizes_that_an_error_suggests_fit(clip):
    with pytest.raises(UserError) as raised:
        latent_grid(clip, STRIDE)
    message = str(raised.value)
    axis = {"T": 0, "h": 1, "w": 2}[message[0]]
    for length in message.rpartition("use ")[2].split(" or "):
        sizes = list(clip)
        sizes[axis] = int(length)
        assert latent_grid(Grid(*sizes), STRIDE)


CLIPS = CausalVaeConfig(channels=3, width=4, multipliers=(1, 2), factors=(Grid(2, 2, 2),), blocks=1)
IMAGES = ImageVaeConfig(channels=3, levels=ImageLevels(widths=(4, 8), blocks=1, groups=2))
KINDS = {
    "patches": PatchVaeConfig(stride=Grid(2, 4, 4), channels=3, width=4, blocks=1),
    "causal VAE": CLIPS,
    "causal AE": dataclasses.replace(CLIPS, std=0.0),
    "images": IMAGES,
    "inflated images": InflatedConfig(image=IMAGES),
    "codes of clips": VqConfig(network=CLIPS, codebook=CodebookConfig(codes=8, width=3)),
    "MoVQ of images": VqConfig(network=IMAGES, codebook=CodebookConfig(codes=8, width=3), modulated=True),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_keeps_the_interface(name):
    config = KINDS[name]
    assert isinstance(config, AutoencoderConfig)
    assert isinstance(nnx.eval_shape(lambda: config.make(nnx.Rngs(0))), Autoencoder)
    shapes, graph = get_param_shapes(config.make), get_graph_def(config.make)
    assert config.last_layer in flatten(shapes)
    latents, stride = Grid(3, 2, 3), config.stride
    clip = jax.ShapeDtypeStruct((2, 1 + 2 * stride.t, 2 * stride.h, 3 * stride.w, 3), jnp.float32)
    encoded = jax.eval_shape(lambda params, clip: nnx.merge(graph, params).encode(clip), shapes, clip)
    assert encoded.shape == (2, *latents, config.channels)
    decoded = jax.eval_shape(lambda params, latents: nnx.merge(graph, params).decode(latents), shapes, encoded)
    assert (decoded.shape, decoded.dtype) == (clip.shape, clip.dtype)
    again = config_json.from_json(config_json.to_json(config))
    assert (again, hash(again)) == (config, hash(config))
