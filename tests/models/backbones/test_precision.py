"""Which products of a model in bfloat16 stay in float32 on TPUs."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.models.conditioning import Conditioning, TextTokens
from dit_video.nn import get_graph_def, get_param_shapes
from dit_video.tokens import PackedRows
from support.jaxprs import list_products

SIZES = {"context_width": 8, "width": 48, "layers": 1, "heads": 2, "dtype": "bfloat16", "attention": "dense"}
MODELS = {
    "shared": DiTConfig(channels=4, **SIZES),
    "own": DiTConfig(channels=4, modulation="own", **SIZES),
    "wan": WanDitConfig(channels=4, mlp_dim=64, text_length=8, time_width=16, **SIZES),
}
TOKENS, TEXT = 16, 8


def lower_gradients(config, monkeypatch):
    """Return the text of the program of a model's gradients for TPUs."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    graph, shapes = get_graph_def(config.make), get_param_shapes(config.make)
    layout = PackedRows(segments=jnp.ones((1, TOKENS), jnp.int32), positions=jnp.zeros((1, TOKENS, 3)), count=1)

    def loss(params, noisy, time, text):
        conditioning = Conditioning(TextTokens(text, jnp.ones((1, TEXT), jnp.int32)))
        return nnx.merge(graph, params)(noisy, time, layout, conditioning)[0].sum()

    times = TOKENS if config.time == "token" else 1
    sizes = (1, TOKENS, config.token_width), (1, times), (1, TEXT, config.context_width)
    arrays = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
    return jax.jit(jax.grad(loss)).trace(shapes, *arrays).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("name", MODELS)
def test_small_float32_maps_are_computed_in_float32_and_large_products_are_not(name, monkeypatch):
    products = list_products(lower_gradients(MODELS[name], monkeypatch))
    exact = [product for product in products if "precision = [HIGHEST, HIGHEST]" in product]
    rounded = [product for product in products if product not in exact]
    for product in rounded:
        left, right = re.search(r": \(tensor<([^>]*)>, tensor<([^>]*)>\)", product).groups()
        assert left.endswith("bf16") or right.endswith("bf16"), product
    # Two maps of the time, the modulation and the head, each with gradients.
    assert len(exact) >= 4 * 2
    assert len(rounded) > len(exact)


@pytest.mark.nightly
def test_a_modulation_of_every_token_is_a_large_product(monkeypatch):
    segment, token = (
        sum("HIGHEST" in product for product in list_products(lower_gradients(config, monkeypatch)))
        for config in (MODELS["shared"], DiTConfig(channels=4, time="token", **SIZES))
    )
    assert 0 < token < segment
