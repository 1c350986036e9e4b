import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.models.autoencoders import AdversarialConfig
from dit_video.nn import get_graph_def, init_params

CONFIG = AdversarialConfig(width=4, layers=2)
PARAMS = jax.jit(init_params, static_argnums=0)(CONFIG.make, jax.random.key(0))
CLIP = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 5, 12, 8, 3)), jnp.float32)


@jax.jit
def judge(pixels):
    return nnx.merge(get_graph_def(CONFIG.make), PARAMS)(pixels)


@pytest.mark.parametrize(
    ("size", "verdicts"), [((5, 12, 8), (2, 3, 2)), ((1, 8, 8), (1, 2, 2)), ((4, 4, 7), (1, 1, 1))]
)
def test_a_verdict_for_every_patch_of_clips_and_images(size, verdicts):
    assert jax.eval_shape(judge, jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)).shape == (2, *verdicts)


def test_a_verdict_depends_on_its_own_clip_and_on_frames_before_and_after():
    verdicts = judge(CLIP)
    np.testing.assert_array_equal(judge(CLIP.at[0].set(0))[1], verdicts[1])
    for frame, seen in ((4, 0), (0, 1)):  # of frame 4 the first verdicts know, of frame 0 the last
        assert (judge(CLIP.at[:, frame].set(0))[:, seen] != verdicts[:, seen]).any()


def test_all_places_but_the_borders_are_judged_alike():
    wide = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (1, 1, 64, 64, 3)), jnp.float32)
    moved = jnp.roll(wide, 4, axis=3)
    np.testing.assert_allclose(judge(moved)[..., 8:10], judge(wide)[..., 7:9], rtol=1e-5, atol=1e-6)
