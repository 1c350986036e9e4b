import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.errors import UserError
from dit_video.models.features import Lpips
from dit_video.nn import get_graph_def, init_params

GRAPH = get_graph_def(lambda rngs: Lpips(widths=(4, 4, 6, 6, 8), rngs=rngs))
PARAMS = jax.jit(lambda key: init_params(lambda rngs: Lpips(widths=(4, 4, 6, 6, 8), rngs=rngs), key))(jax.random.key(0))
ONE, OTHER = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 2, 2, 17, 16, 3)), jnp.float32)


@jax.jit
def distance(one, other):
    return nnx.merge(GRAPH, PARAMS)(one, other)


@jax.jit
def gradient(one, other, params=PARAMS):
    return jax.grad(lambda x: nnx.merge(GRAPH, params)(x, other).sum())(one)


def test_lpips_is_a_distance_for_each_clip():
    values = distance(ONE, OTHER)
    assert values.shape == (2,)
    assert (values > 0).all()
    np.testing.assert_allclose(distance(OTHER, ONE), values, rtol=1e-5)
    assert distance(ONE, ONE).tolist() == [0, 0]
    np.testing.assert_allclose(distance(ONE, OTHER.at[0].set(ONE[0])), values.at[0].set(0), rtol=1e-5)


def test_a_clip_s_distance_is_the_mean_of_its_frames():
    # Frames as clips of one frame, filled up to the shape that is compiled.
    def frame(index):
        return distance(*(jnp.repeat(clips[:, index : index + 1], 2, axis=1) for clips in (ONE, OTHER)))

    np.testing.assert_allclose((frame(0) + frame(1)) / 2, distance(ONE, OTHER), rtol=1e-5)


def test_gradients_are_finite_where_all_features_are_zero():
    black = jnp.full_like(ONE, -1.0)
    assert np.isfinite(gradient(ONE, OTHER, PARAMS)).all()
    assert np.isfinite(gradient(black, OTHER, PARAMS)).all()
    dead = jax.tree.map(jnp.zeros_like, PARAMS)
    assert (gradient(ONE, OTHER, dead) == 0).all()


def test_frames_that_end_before_the_last_stage_are_refused():
    with pytest.raises(UserError, match=r"15x16 .*16x16 or more"):
        nnx.merge(GRAPH, PARAMS)(ONE[:, :, :15], OTHER[:, :, :15])
