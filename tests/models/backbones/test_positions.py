import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.errors import UserError
from dit_video.models.backbones.positions import AxisTables, FactorizedEmbedding, ImageSineCosine, SineCosine
from dit_video.nn import sinusoidal_embedding
from dit_video.tokens import expand_to_tokens, split_evenly
from support.packed_rows import SEGMENTS, make_batch

GIVEN = make_batch((0, 1), (1, 0))


def test_sines_and_cosines_of_the_axes_are_concatenated():
    result = SineCosine(max_period=50.0).compute_features(GIVEN.positions, GIVEN.segments, count=SEGMENTS, width=20)
    assert result.shape == (2, 18, 20)
    start = 0
    for axis, width in enumerate(split_evenly(20)):
        expected = sinusoidal_embedding(GIVEN.positions[..., axis], width, max_period=50.0)
        np.testing.assert_array_equal(result[..., start : start + width], expected)
        start += width


def test_narrow_widths_leave_axes_out():
    result = SineCosine().compute_features(GIVEN.positions, GIVEN.segments, count=SEGMENTS, width=4)
    np.testing.assert_array_equal(result, sinusoidal_embedding(GIVEN.positions[..., 0], 4))


def test_an_images_columns_go_first_and_cover_what_was_trained():
    result = ImageSineCosine(side=4).compute_features(GIVEN.positions, GIVEN.segments, count=SEGMENTS, width=16)
    side = jnp.asarray([4 / 2, 4 / 3])  # of 1x2x3: rows are twice as far apart as trained, columns 4/3
    for start, axis, stretch in ((0, 2, side[1]), (8, 1, side[0])):
        angles = stretch * GIVEN.positions[0, 8:14, axis, None] * 10_000.0 ** -(jnp.arange(4) / 4)
        np.testing.assert_allclose(result[0, 8:14, start : start + 4], jnp.sin(angles), atol=1e-6)
        np.testing.assert_allclose(result[0, 8:14, start + 4 : start + 8], jnp.cos(angles), atol=1e-6)
    with pytest.raises(UserError, match="divisible by 4, not 6"):
        ImageSineCosine().check(6)
    with pytest.raises(UserError, match=r"side=.* must be at least 1"):
        ImageSineCosine(side=0)


def test_fractions_go_from_the_first_to_the_last_token():
    result = FactorizedEmbedding().compute_features(GIVEN.positions, GIVEN.segments, count=SEGMENTS, width=8)
    extents = jnp.asarray([[1.0, 1.0, 1.0], [1.0, 1.0, 2.0]])  # of 2x2x2 and 1x2x3: a single frame is at 0
    expected = GIVEN.positions[0, :14] / expand_to_tokens(extents[None], GIVEN.segments[:1])[0, :14]
    np.testing.assert_allclose(result[0, :14], expected, rtol=1e-6)
    assert (result >= 0).all()
    assert (result <= 1).all()


def test_tables_are_interpolated_between_their_entries():
    tables = AxisTables((2, 3, 5), 4, rngs=nnx.Rngs(jax.random.key(0)))
    positions = jnp.asarray([[[0.0, 0.5, 0.125], [1.0, 1.0, 1.0]]])
    t, h, w = tables.t[...], tables.h[...], tables.w[...]
    expected = np.stack([t[0] + h[1] + (w[0] + w[1]) / 2, t[1] + h[2] + w[4]])
    np.testing.assert_allclose(tables(positions)[0], expected, atol=1e-6)
