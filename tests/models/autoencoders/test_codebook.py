"""Codebooks that learn from latents, as written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.models.autoencoders import CodebookLearning

CODES = jnp.asarray([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [9.0, 9.0]])
LATENTS = jnp.asarray([[0.5, 0.5], [0.5, -0.5], [2.0, 0.0], [0.0, 3.0]]).reshape(1, 1, 2, 2, 2)
INDICES = jnp.asarray([0, 0, 1, 2]).reshape(1, 1, 2, 2)
RANDOM = jax.random.key(0)


def follow(learning, codes=CODES, moments=None, latents=LATENTS, indices=INDICES, random=RANDOM):
    return _follow(learning, codes, moments or learning.init_moments(codes), latents, indices, random)


@functools.partial(jax.jit, static_argnums=0)
def _follow(learning, codes, moments, latents, indices, random):
    return learning.update(codes, moments, latents, indices, random)


def test_moving_averages_update_codes_as_written_out():
    learning = CodebookLearning(decay=0.9, smoothing=1e-3, restart_after=None)
    result = follow(learning)
    counts = 0.9 * np.ones(4) + 0.1 * np.asarray([2, 1, 1, 0])
    sums = 0.9 * np.asarray(CODES) + 0.1 * np.asarray([[1, 0], [2, 0], [0, 3], [0, 0]])
    total = counts.sum()
    smoothed = (counts + 1e-3) / (total + 4e-3) * total
    np.testing.assert_allclose(result.moments["counts"], counts, rtol=1e-6)
    np.testing.assert_allclose(result.moments["sums"], sums, rtol=1e-6)
    np.testing.assert_allclose(result.codes, sums / smoothed[:, None], rtol=1e-5)
    np.testing.assert_array_equal(result.moments["ages"], [0, 0, 0, 1])
    assert not result.restarted.any()


def test_codes_go_to_the_means_of_what_they_stand_for():
    learning = CodebookLearning(decay=0.9, restart_after=None)
    result = follow(learning)
    for _ in range(150):
        result = follow(learning, result.codes, result.moments)
    np.testing.assert_allclose(result.codes[:3], [[0.5, 0], [2, 0], [0, 3]], atol=1e-2)


def test_without_decay_codes_are_left_to_the_gradients():
    result = follow(CodebookLearning(decay=None, restart_after=None))
    np.testing.assert_array_equal(result.codes, CODES)
    assert set(result.moments) == {"ages"}


@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_code_that_is_not_used_comes_back_among_the_latents(decay):
    learning = CodebookLearning(decay=decay, restart_after=3)
    moments = learning.init_moments(CODES) | {"ages": jnp.zeros(4, jnp.int32)}
    codes = CODES
    for step in range(1, 4):
        result = follow(learning, codes, moments)
        codes, moments = result.codes, result.moments
        assert result.metrics["restarts"] == (step == 3)
        np.testing.assert_array_equal(result.restarted, [False, False, False, step == 3])
    flat = np.asarray(LATENTS).reshape(-1, 2)
    assert (np.asarray(codes[3]) == flat).all(axis=-1).any()
    np.testing.assert_array_equal(moments["ages"], 0)
    if decay is not None:  # its average restarts there
        np.testing.assert_array_equal(moments["sums"][3], codes[3])
        assert moments["counts"][3] == 1


def test_a_new_codebook_starts_at_the_first_latents():
    learning = CodebookLearning()
    codes = jnp.full((4, 2), 50.0)
    latents = jax.random.normal(jax.random.key(1), (2, 1, 4, 4, 2))
    result = follow(learning, codes, latents=latents, indices=jnp.zeros((2, 1, 4, 4), jnp.int32))
    flat = np.asarray(latents).reshape(-1, 2)
    places = [np.flatnonzero((flat == np.asarray(code)).all(axis=-1)) for code in result.codes[1:]]
    assert [len(place) for place in places] == [1, 1, 1]
    assert len(np.unique(np.concatenate(places))) == 3  # one latent each
    again = follow(learning, codes, latents=latents, indices=jnp.zeros((2, 1, 4, 4), jnp.int32))
    np.testing.assert_array_equal(again.codes, result.codes)
    other = learning.update(
        codes, learning.init_moments(codes), latents, jnp.zeros((2, 1, 4, 4), jnp.int32), jax.random.key(5)
    )
    assert (other.codes != result.codes).any()


def test_a_learned_codebook_stays_where_it_is():
    learning = CodebookLearning(decay=None)
    result = follow(learning, moments=learning.init_moments(CODES, fresh=False))
    np.testing.assert_array_equal(result.codes, CODES)
    assert result.metrics["restarts"] == 0


def test_restarts_replace_at_most_as_many_codes_as_there_are_latents():
    learning = CodebookLearning(restart_after=1)
    codes = jnp.full((9, 2), 50.0)
    result = follow(learning, codes)
    assert np.isfinite(result.codes).all()
    assert result.metrics["restarts"] == 6


def test_the_figures_are_usage_and_perplexity_of_the_codes():
    figures = follow(CodebookLearning(restart_after=None)).metrics
    assert set(figures) == {"usage", "perplexity"}
    assert figures["usage"] == 0.75
    assert figures["perplexity"] == pytest.approx(np.exp(0.5 * np.log(2) + 0.5 * np.log(4)))
    even = jnp.arange(4).reshape(1, 1, 2, 2)
    figures = follow(CodebookLearning(), indices=even).metrics
    assert figures["perplexity"] == pytest.approx(4)
    assert (figures["usage"], figures["usage_recent"], figures["restarts"]) == (1, 1, 0)
    learning = CodebookLearning(restart_after=5)
    moments = learning.init_moments(CODES) | {"ages": jnp.asarray([9, 9, 9, 2])}
    assert follow(learning, moments=moments).metrics["usage_recent"] == 1  # the last was used three steps ago


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, r"decay=1\.0 is invalid: it must lie in \[0, 1\)"),
        ({"commitment": -1.0}, r"commitment=-1\.0 is invalid"),
        ({"smoothing": 0.0}, "smoothing=0.0 is invalid: it must be positive"),
        ({"restart_after": 0}, "restart_after=0 is invalid: it must be at least 1"),
    ],
)
def test_invalid_codebook_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        CodebookLearning(**options)
