"""Probes of a trained model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.core.offload import Stages, is_in_host_memory
from dit_video.diffusion import Euler, UniformTimes, apply_classifier_free_guidance, sample
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.probe import DenoiserProbe
from support.latents import generate_latents

PROMPTS, SIZE = ["a red circle moving left", "a blue square"], (9, 16, 32)


@pytest.mark.slow
def test_sampling_the_probe_gives_the_clip_of_the_pipeline(tiny_pipeline):
    config = tiny_pipeline.config
    inside, empty = DenoiserProbe(tiny_pipeline, PROMPTS), DenoiserProbe(tiny_pipeline, ["", ""])
    drawn = np.random.default_rng(0).normal(size=(2, *inside.latent_grid, inside.channels)).astype(np.float32)
    denoise = apply_classifier_free_guidance(inside.denoise, empty.denoise, 2.0)
    times = UniformTimes()(config.model.process, 2).times
    result = sample(denoise, jnp.asarray(inside.patchify(drawn)), times, process=config.model.process, solver=Euler())
    latents = np.asarray(inside.unpatchify(result))
    assert latents.shape == drawn.shape
    expected = generate_latents(tiny_pipeline, PROMPTS[1], noise=drawn[1], steps=2, guidance=2.0)
    np.testing.assert_allclose(latents[1], expected, atol=1e-5)


@pytest.mark.slow
def test_each_clip_has_a_time_and_a_prompt_of_its_own(tiny_pipeline):
    inside = DenoiserProbe(tiny_pipeline, PROMPTS, SIZE)
    noisy = jax.random.normal(jax.random.key(0), (2, inside.token_grid.volume, 4 * inside.channels))
    both, _ = inside.denoise(noisy, jnp.asarray([[0.2], [0.9]]))
    alone, _ = DenoiserProbe(tiny_pipeline, PROMPTS[1:], SIZE).denoise(noisy[1:], jnp.asarray(0.9))
    np.testing.assert_allclose(both[1], alone[0], atol=1e-6)


@pytest.mark.slow
def test_attention_maps_cover_the_tokens_of_every_clip(tiny_pipeline):
    inside = DenoiserProbe(tiny_pipeline, PROMPTS, SIZE)
    noisy = jnp.zeros((2, inside.token_grid.volume, 4 * inside.channels))
    queries = [inside.find_token((2, 0.9, 0.1)), inside.find_token((0, 0.0, 0.99))]
    assert queries == [4, 1]  # of 3 x 1 x 2 tokens
    maps = inside.compute_attention_maps(noisy, 0.5, queries=queries)
    assert maps.shape == (1, 2, 2, 2, inside.token_grid.volume)
    np.testing.assert_allclose(maps.sum(axis=-1), 1, atol=1e-5)


@pytest.mark.slow
def test_weights_in_host_memory_give_the_same_maps(tiny_pipeline):
    params = {"autoencoder": tiny_pipeline.codec.params, "denoiser": tiny_pipeline.denoiser_params}
    offloaded = Pipeline(tiny_pipeline.config, **params, offload=Stages())
    assert is_in_host_memory(jax.tree.leaves(offloaded.denoiser_params)[0])
    maps = []
    for pipeline in (tiny_pipeline, offloaded):
        inside = DenoiserProbe(pipeline, PROMPTS[:1], SIZE)
        noisy = jnp.zeros((1, inside.token_grid.volume, 4 * inside.channels))
        maps.append(inside.compute_attention_maps(noisy, 0.5, queries=[0]))
    np.testing.assert_array_equal(*maps)


def test_models_and_inputs_that_a_probe_cannot_take_are_refused(tiny_pipeline):
    with pytest.raises(UserError, match="name one"):
        DenoiserProbe(tiny_pipeline, [])
    with pytest.raises(UserError, match="divisible"):
        DenoiserProbe(tiny_pipeline, PROMPTS, (9, 16, 20))
    with pytest.raises(UserError, match="outside"):
        DenoiserProbe(tiny_pipeline, PROMPTS).find_token((0, 1.0, 0.5))
    config = dataclasses.replace(tiny_pipeline.config, boundary=0.5)
    params = tiny_pipeline.denoiser_params
    two = Pipeline(config, autoencoder=tiny_pipeline.codec.params, denoiser=params | {"low_noise": params["backbone"]})
    with pytest.raises(UserError, match=r"two experts .*; use a plain text-to-video model"):
        DenoiserProbe(two, PROMPTS)
