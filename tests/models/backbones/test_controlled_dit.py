"""A control stack around a DiT: nothing until it is trained, nothing at strength 0, and the model's own interfaces."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.errors import UserError
from dit_video.core.trees import flatten
from dit_video.models.backbones.controlled_dit import ControlledDiTConfig
from dit_video.models.backbones.conversion import grow, grow_config
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.conditioning import Control, ControlClip, LowResolutionClip
from dit_video.nn import get_graph_def
from dit_video.nn.attention import CausalFrames, Full
from dit_video.training.optim.optimizer import AdamW
from support.packed_rows import (
    FIRST,
    TEXT_WIDTH,
    assert_packed_is_unpacked,
    assert_segments_are_apart,
    make_batch,
    predict,
    predict_with_gradients,
)
from support.random_params import make_random_params

BASE = DiTConfig(channels=2, context_width=TEXT_WIDTH, width=24, layers=3, heads=2, registers=1)
CONFIG = ControlledDiTConfig(**vars(BASE) | {"conditioning": (ControlClip(),)}, control_layers=2)
PARAMS = make_random_params(CONFIG.make)
BATCH = make_batch((0, 1), (1, 0))


def predict_with(params, config, strength=1.0, values=None):
    """Return predictions with a strength of the control."""
    control = BATCH.get_conditioning(CONFIG)[Control]
    changed = Control(control.values if values is None else values, jnp.full(control.strength.shape, strength))
    own = BATCH.get_conditioning(BASE)
    own = own.add(changed) if config is CONFIG else own
    model = nnx.merge(get_graph_def(config.make), params)
    return jax.jit(lambda: model(BATCH.noisy, BATCH.time, BATCH.layout, own)[0])()


@pytest.mark.slow
def test_packed_is_unpacked_in_values_and_gradients():
    assert_packed_is_unpacked(PARAMS, CONFIG)


def test_a_clip_does_not_depend_on_others_in_its_row_bit_for_bit():
    assert_segments_are_apart(PARAMS, CONFIG)


def test_a_grown_model_predicts_as_before_and_its_stack_learns():
    params = make_random_params(BASE.make)
    assert grow_config(BASE, CONFIG) == CONFIG
    grown = grow(BASE, params, CONFIG, jax.random.key(0))
    np.testing.assert_allclose(predict(grown, BATCH, CONFIG), predict(params, BATCH, BASE), atol=1e-6)
    np.testing.assert_array_equal(grown["control"]["blocks"]["out"]["kernel"], params["blocks"]["out"]["kernel"][:2])
    _, gradients, _ = predict_with_gradients(grown, BATCH, CONFIG)
    assert np.abs(gradients["control"]["blocks"]["hint"]["kernel"]).max() > 1e-3
    trains = AdamW(trainable=("control",)).is_trained
    new = {path for path in flatten(grown) if path not in flatten(params)}
    assert {path for path in flatten(grown) if trains(path)} == new


def test_without_strength_the_model_is_that_below_the_stack():
    base = {name: leaf for name, leaf in PARAMS.items() if "control" not in name}
    expected = predict_with(base, BASE)
    np.testing.assert_array_equal(predict_with(PARAMS, CONFIG, 0.0), expected)
    half, full = (np.abs(predict_with(PARAMS, CONFIG, strength) - expected).max() for strength in (0.5, 1.0))
    assert full > half > 1e-3
    other = predict_with(PARAMS, CONFIG, values=jnp.zeros_like(BATCH.latents)) - predict_with(PARAMS, CONFIG)
    assert (np.abs(other)[0, FIRST].max(axis=-1) > 1e-4).all()


def test_ranges_of_blocks_and_some_of_the_tokens_equal_all():
    model, conditioning = nnx.merge(get_graph_def(CONFIG.make), PARAMS), BATCH.get_conditioning(CONFIG)
    x, inputs = model.embed_inputs(BATCH.noisy, BATCH.time, BATCH.layout, conditioning)
    expected, _ = model.apply_blocks(x, inputs)
    part, _ = model.apply_blocks(x, inputs, layers=slice(0, 1))
    result, _ = model.apply_blocks(part, inputs, layers=slice(1, None))
    np.testing.assert_allclose(result, expected, atol=1e-5)
    kept = jnp.tile(jnp.arange(x.shape[1])[::-1], (len(x), 1))
    turned, _ = model.apply_blocks(x[:, ::-1], inputs.take(kept))
    np.testing.assert_allclose(turned[:, ::-1], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"conditioning": ()}, r"conditioning \(none\) is invalid: the stack reads one ControlClip"),
        ({"conditioning": (LowResolutionClip(),)}, r"conditioning \(LowResolutionClip\) is invalid"),
        ({"control_layers": 4}, "control_layers=4 is invalid: the stack has copies of some of the 3 blocks"),
        ({"pattern": (Full(), CausalFrames(), Full())}, "a control stack needs one for all layers"),
    ],
)
def test_what_the_stack_cannot_be_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **fields)
