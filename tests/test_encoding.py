"""Which stretches are encoded, and how latents are measured."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dit_video import pixels, rng
from dit_video.encoding import encode_clips, latent_moments, stretches
from dit_video.nn import graph_of, init_params
from dit_video.run import Run

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def clips(tiny_run):
    return Run.open(tiny_run).training_clips


@pytest.fixture
def autoencoder(tiny):
    make = tiny.EXPERIMENT.autoencoder.model.make
    return graph_of(make), init_params(make, rng.key(0, "autoencoder"))


def test_stretches_are_spread_over_a_clip_s_length(tiny, clips):
    limits = dataclasses.replace(tiny.EXPERIMENT.limits, max_frames=5)
    expected = {1: [0], 5: [0], 9: [0, 2, 4]}
    assert stretches(clips, limits, most=3) == [expected[info.frames] for info in clips.infos]


def test_every_stretch_is_encoded_once_and_as_it_would_be_alone(tiny, clips, autoencoder):
    limits = dataclasses.replace(tiny.EXPERIMENT.limits, max_frames=5)
    starts = stretches(clips, limits, most=2)
    examples = {example.name: example for example in encode_clips(*autoencoder, clips, limits, starts)}
    names = [f"{info.name}@{start}" for info, of_clip in zip(clips.infos, starts, strict=True) for start in of_clip]
    assert sorted(examples) == sorted(names)

    index = next(index for index, of_clip in enumerate(starts) if len(of_clip) == 2)
    alone = list(
        encode_clips(*autoencoder, clips, limits, [[] if one != index else starts[one] for one in range(len(clips))])
    )
    assert [example.caption for example in alone] == [clips.infos[index].caption] * 2
    for example in alone:
        np.testing.assert_allclose(example.latents, examples[example.name].latents, atol=1e-5)
    assert not np.allclose(alone[0].latents, alone[1].latents)


def test_moments_are_those_of_all_positions(autoencoder):
    from flax import nnx

    generator = np.random.default_rng(0)
    batches = [generator.integers(0, 256, (4, frames, 16, 16, 3), np.uint8) for frames in (5, 9, 1)]
    graph, params = autoencoder
    mean, std = latent_moments(graph, params, batches)
    model = nnx.merge(graph, params)
    latents = np.concatenate(
        [
            np.asarray(model.posterior(pixels.to_float(jnp.asarray(batch))).mean).reshape(-1, len(mean))
            for batch in batches
        ]
    )
    np.testing.assert_allclose(mean, latents.mean(0), atol=1e-5)
    np.testing.assert_allclose(std, latents.std(0), rtol=1e-4)


def test_a_channel_without_variance_is_no_division_by_zero(autoencoder):
    graph, params = autoencoder
    params["linear"]["down"]["kernel"] = jnp.zeros_like(params["linear"]["down"]["kernel"])
    _mean, std = latent_moments(graph, params, [np.full((4, 5, 16, 16, 3), 90, np.uint8)] * 3)
    assert np.isfinite(std).all()
    assert (std > 0).all()
