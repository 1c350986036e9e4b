"""Codecs whose chunks are as long as the memory allows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.errors import UserError
from dit_video.core.memory import count_peak_bytes
from dit_video.data.latents.codec import LatentCodec, fit_chunk
from dit_video.models.autoencoders import CausalVaeConfig, Tiles
from dit_video.models.autoencoders.streaming import estimate_chunk_bytes
from dit_video.nn import ConvCache, get_graph_def, get_param_shapes
from dit_video.tokens import Grid
from support.random_params import make_random_params
from support.tiny_ltx import VAE as LTX

CONFIG = CausalVaeConfig(channels=4, width=8, multipliers=(1, 2), factors=(Grid(2, 2, 2),), blocks=1)
GRID = Grid(7, 8, 8)


@pytest.fixture(scope="module")
def params():
    return make_random_params(CONFIG.make)


def test_values_count_from_their_operation_to_their_last_use():
    def program(x):
        double = x * 2  # 400 bytes
        wide = jnp.outer(double, double)  # 40,000, while `double` is alive
        return wide.sum() + double[0]

    peak = count_peak_bytes(jax.make_jaxpr(program)(jnp.zeros(100)))
    assert 40_400 <= peak <= 41_600
    looped = jax.make_jaxpr(lambda x: jax.lax.fori_loop(0, 9, lambda _, y: y + program(y), x))(jnp.zeros(100))
    assert peak <= count_peak_bytes(looped) <= peak + 1_000


@pytest.mark.nightly
@pytest.mark.parametrize("method", ["encode", "decode"])
def test_the_estimate_is_near_the_memory_of_the_compiled_program(method):
    graph, stride = get_graph_def(CONFIG.make), CONFIG.stride
    size = GRID._replace(t=2)
    first = shape = (1, *size, CONFIG.channels)
    if method == "encode":
        shape = (1, size.t * stride.t, size.h * stride.h, size.w * stride.w, 3)
        first = (1, 1 + (size.t - 1) * stride.t, *shape[2:])

    def run(params, values, features):
        cache = ConvCache(features)
        return getattr(nnx.merge(graph, params), method)(values, cache=cache), cache.features

    values, shapes = jax.ShapeDtypeStruct(shape, jnp.float32), get_param_shapes(CONFIG.make)
    _, features = jax.eval_shape(run, shapes, jax.ShapeDtypeStruct(first, jnp.float32), None)
    memory = jax.jit(run, donate_argnums=2).lower(shapes, values, features).compile().memory_analysis()
    held = sum(each.size * each.dtype.itemsize for each in jax.tree.leaves((values, features)))
    compiled = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + held
    estimate = estimate_chunk_bytes(CONFIG, method, 1, size)
    assert 0.5 * compiled < estimate < 2 * compiled


@pytest.mark.slow
def test_frames_do_not_depend_on_the_memory(params):
    latents = np.random.default_rng(0).normal(size=(1, *GRID, CONFIG.channels)).astype(np.float32)
    (whole,) = LatentCodec(CONFIG, params).decode_chunks(latents)
    one, three = (estimate_chunk_bytes(CONFIG, "decode", 1, GRID._replace(t=count)) for count in (1, 3))
    lengths = {}
    for memory in (one, three + 1):
        chunks = list(LatentCodec(CONFIG, params, memory=memory).decode_chunks(latents))
        lengths[memory] = [chunk.shape[1] for chunk in chunks]
        np.testing.assert_allclose(np.concatenate(chunks, 1).astype(int), whole.astype(int), atol=1)
    assert lengths == {one: [1] + [2] * 6, three + 1: [5, 6, 2]}


def test_encoding_keeps_to_the_memory_too(params):
    pixels = np.random.default_rng(0).integers(0, 256, (13, 16, 16, 3), dtype=np.uint8)
    memory = estimate_chunk_bytes(CONFIG, "encode", 1, GRID._replace(t=1))
    small = LatentCodec(CONFIG, params, memory=memory).encode_pixels(pixels)
    np.testing.assert_allclose(small, LatentCodec(CONFIG, params).encode_pixels(pixels), atol=1e-4)


def test_too_little_memory_is_an_error_that_tiles_mend(params):
    latents = np.zeros((1, *GRID, CONFIG.channels), np.float32)
    memory = estimate_chunk_bytes(CONFIG, "decode", 1, Grid(1, 4, 4))
    with pytest.raises(UserError, match=r"memory=.* one latent frame of 1 clips takes about .* smaller tiles"):
        next(LatentCodec(CONFIG, params, memory=memory).decode_chunks(latents))
    tiles = Tiles(height=8, width=8, overlap=2)
    tiled = LatentCodec(CONFIG, params, memory=memory, tiles=tiles).decode_many(latents)
    assert tiled.shape == (1, 13, 16, 16, 3)


def test_a_decoder_that_sees_later_frames_is_counted_for_the_whole_clip():
    """A plan would otherwise be of another program than decoding runs."""
    config, grid = LTX, Grid(3, 1, 3)
    needed, count = fit_chunk(config, "decode", 1, grid, memory=1)
    assert (needed, count) == (estimate_chunk_bytes(config, "decode", 1, grid), grid.t)
    assert needed > estimate_chunk_bytes(config, "decode", 1, grid._replace(t=1))
    codec = LatentCodec(config, {}, memory=1)
    with pytest.raises(UserError, match="to decode all latent frames of 1 clips"):
        next(codec.decode_chunks(np.zeros((1, *grid, config.channels), np.float32)))
