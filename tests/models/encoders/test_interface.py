"""The part of a frozen encoder on the device, which hands embeddings on."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core import config_json, rng
from dit_video.core.errors import UserError
from dit_video.models.encoders import FrozenTextConfig
from dit_video.nn import get_graph_def, get_param_shapes, init_params

CONFIG = FrozenTextConfig(folder="encoders/umt5", width=6, max_tokens=9, dtype="bfloat16", identity="abc")


def test_a_frozen_encoder_hands_embeddings_on_as_the_context():
    values = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    segments = np.asarray([[1, 1, 2, 0, 0], [1, 2, 2, 2, 3]], np.int32)
    params = init_params(CONFIG.make, rng.key(0, "text"))
    assert params == get_param_shapes(CONFIG.make) == {}
    encoder = nnx.merge(get_graph_def(CONFIG.make), params)
    context = encoder(jnp.asarray(values), jnp.asarray(segments))
    np.testing.assert_array_equal(context.values, values)
    np.testing.assert_array_equal(context.segments, segments)


def test_a_frozen_config_comes_back_from_json():
    assert config_json.from_json(json.loads(json.dumps(config_json.to_json(CONFIG)))) == CONFIG


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"folder": ""}, "folder='' is invalid: .* Use the folder of its weights"),
        ({"width": 0}, "width=0 is invalid: it must be at least 1"),
        ({"max_tokens": 0}, "max_tokens=0 is invalid: it must be at least 1"),
    ],
)
def test_invalid_frozen_configs_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        FrozenTextConfig(**{"folder": "f", "width": 8, "max_tokens": 4} | wrong)
