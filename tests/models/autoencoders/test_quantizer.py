"""Quantisation: nearest codes, the straight-through gradient, and indices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.errors import UserError
from dit_video.models.autoencoders import CodebookConfig
from dit_video.models.autoencoders.vq import Codebook, find_nearest_codes

DRAW = np.random.default_rng(0)


def book(codes, **options):
    codes = np.asarray(codes, np.float32)
    made = Codebook(CodebookConfig(codes=len(codes), width=codes.shape[1], **options), rngs=nnx.Rngs(0))
    made.codes[...] = jnp.asarray(codes)
    return made


@pytest.mark.parametrize("chunk", [1, 4, 10, 11, 64])
def test_the_nearest_code_is_chosen_whatever_the_chunk(chunk):
    codes = DRAW.normal(size=(11, 3)).astype(np.float32)
    latents = DRAW.normal(size=(2, 3, 5, 3)).astype(np.float32)
    distances = np.square(latents[..., None, :] - codes).sum(axis=-1)
    np.testing.assert_array_equal(
        find_nearest_codes(jnp.asarray(latents), jnp.asarray(codes), chunk=chunk), distances.argmin(axis=-1)
    )


def test_the_first_of_equal_codes_is_chosen():
    codes = jnp.ones((7, 2))
    for chunk in (2, 7):
        assert (np.asarray(find_nearest_codes(jnp.zeros((4, 2)), codes, chunk=chunk)) == 0).all()


def test_memory_grows_with_the_chunk_and_not_with_the_codes():
    def temporary(codes, chunk):
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4096, 4), (codes, 4))]
        compiled = (
            jax.jit(lambda latents, codes: find_nearest_codes(latents, codes, chunk=chunk)).lower(*shapes).compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(4096, 4096) > 4096**2 * 4
    assert temporary(4096, 256) < 1.2 * temporary(1024, 256)
    assert temporary(4096, 256) < 4096**2


def test_a_quantised_latent_is_its_code_and_passes_gradients_on():
    codes = book([[0, 0], [4, 0], [0, 4]])
    latents = jnp.asarray([[3.0, 1.0], [0.5, -1.0]]).reshape(1, 1, 1, 2, 2)
    result = codes(latents)
    np.testing.assert_array_equal(result.indices.reshape(-1), [1, 0])
    np.testing.assert_allclose(result.vectors.reshape(2, 2), [[4, 0], [0, 0]], atol=1e-6)
    assert result.commitment_loss.shape == (1,)
    # Squared distances 1 + 1 and 0.25 + 1, over four values.
    np.testing.assert_allclose(result.commitment_loss, [3.25 / 4])
    np.testing.assert_array_equal(result.commitment_loss, result.codebook_loss)
    weights = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])
    graph, _ = nnx.split(codes)

    def through(part):
        def value(latents, codes):
            quantized = nnx.merge(graph, {"codes": codes})(latents)
            values = {"vectors": quantized.vectors.reshape(2, 2) * weights}
            return {**values, "commitment": quantized.commitment_loss, "attraction": quantized.codebook_loss}[
                part
            ].sum()

        return jax.grad(value, argnums=(0, 1))(latents, codes.codes[...])

    by_latents, by_codes = through("vectors")
    np.testing.assert_array_equal(by_latents.reshape(2, 2), weights)
    assert not by_codes.any()
    by_latents, by_codes = through("commitment")
    np.testing.assert_allclose(by_latents.reshape(2, 2), [[-0.5, 0.5], [0.25, -0.5]])
    assert not by_codes.any()
    by_latents, by_codes = through("attraction")
    assert not by_latents.any()
    np.testing.assert_allclose(by_codes, [[-0.25, 0.5], [0.5, -0.5], [0, 0]])


def test_spherical_codes_are_compared_by_their_direction():
    codes = book([[10, 0], [0, 0.1]], spherical=True)
    latents = jnp.asarray([[0.1, 0.2], [5.0, 4.0], [0.0, 0.0]]).reshape(1, 1, 1, 3, 2)
    result = codes(latents)
    np.testing.assert_array_equal(result.indices.reshape(-1)[:2], [1, 0])
    np.testing.assert_allclose(result.vectors.reshape(3, 2)[:2], [[0, 1], [1, 0]], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(result.latents.reshape(3, 2)[:2], axis=-1), 1, rtol=1e-6)
    gradient = jax.grad(lambda x: codes(x).commitment_loss.sum())(latents)
    assert np.isfinite(gradient).all()


def test_looked_up_codes_are_found_again():
    codes = book(DRAW.normal(size=(5, 3)))
    indices = np.asarray([[4, 0], [2, 2]], np.int32).reshape(1, 1, 2, 2)
    vectors = codes.look_up(indices)
    np.testing.assert_array_equal(vectors, np.asarray(codes.codes[...])[indices])
    np.testing.assert_array_equal(codes.find_nearest(vectors), indices)


@pytest.mark.parametrize("wrong", [5, -1])
def test_an_index_out_of_range_is_refused(wrong):
    codes = book(DRAW.normal(size=(5, 3)))
    indices = np.asarray([0, wrong], np.int32).reshape(1, 1, 1, 2)
    with pytest.raises(UserError, match=f"index {wrong} .* 0 to 4.* Use the codebook"):
        codes.look_up(indices)
    traced = jax.jit(lambda indices: codes.look_up(indices))(indices).reshape(2, 3)
    assert np.isfinite(traced[0]).all()
    assert np.isnan(traced[1]).all()


@pytest.mark.parametrize(("codes", "width"), [(0, 4), (8, 0)])
def test_an_empty_codebook_is_refused(codes, width):
    with pytest.raises(UserError, match="=0 is invalid: it must be at least 1"):
        CodebookConfig(codes=codes, width=width)
