import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_video.core.errors import UserError
from dit_video.tokens import Grid, compute_token_grid, patchify, unpatchify

SIDES = st.integers(1, 3)
GRIDS = st.builds(Grid, SIDES, SIDES, SIDES)


@settings(max_examples=40, deadline=None)
@given(grid=GRIDS, patch=GRIDS, channels=SIDES, batch=st.lists(SIDES, max_size=2))
def test_unpatchify_inverts_patchify(grid, patch, channels, batch):
    shape = (*batch, grid.t * patch.t, grid.h * patch.h, grid.w * patch.w, channels)
    latents = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    tokens = patchify(latents, patch)
    assert tokens.shape == (*batch, grid.volume, patch.volume * channels)
    np.testing.assert_array_equal(unpatchify(tokens, grid, patch), latents)


def test_tokens_and_their_values_are_in_time_height_width_order():
    t, h, w, c = np.meshgrid(*map(np.arange, (4, 4, 6, 2)), indexing="ij")
    latents = (1000 * t + 100 * h + 10 * w + c).astype(np.float32)
    tokens = patchify(latents, Grid(2, 2, 3))
    assert tokens.shape == (8, 24)
    assert tokens[:, 0].tolist() == [0, 30, 200, 230, 2000, 2030, 2200, 2230]
    assert tokens[0, :8].tolist() == [0, 1, 10, 11, 20, 21, 100, 101]
    assert tokens[0, 12] == 1000


def test_numpy_and_jax_agree():
    latents = np.random.default_rng(0).normal(size=(2, 4, 4, 4, 3)).astype(np.float32)
    patch = Grid(1, 2, 2)
    jitted = jax.jit(lambda x: patchify(x, patch))(jnp.asarray(latents))
    np.testing.assert_array_equal(np.asarray(jitted), patchify(latents, patch))
    back = unpatchify(jitted, Grid(4, 2, 2), patch)
    np.testing.assert_array_equal(np.asarray(back), latents)


def test_a_token_grid_is_the_latent_grid_divided_by_the_patch():
    assert compute_token_grid(Grid(5, 8, 12), Grid(1, 2, 4)) == Grid(5, 4, 3)
    assert Grid(5, 4, 3).volume == 60


@pytest.mark.parametrize("latents", [Grid(3, 4, 4), Grid(4, 5, 4), Grid(4, 4, 7)])
def test_a_patch_that_does_not_divide_the_latents_is_refused(latents):
    with pytest.raises(UserError, match=r"not divisible by the patch 2x2x2; use"):
        compute_token_grid(latents, Grid(2, 2, 2))
    with pytest.raises(UserError, match=f"{latents.t}x{latents.h}x{latents.w}"):
        patchify(np.zeros((*latents, 3), np.float32), Grid(2, 2, 2))
