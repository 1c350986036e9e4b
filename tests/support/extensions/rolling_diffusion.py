"""Rolling diffusion (arXiv 2402.09470): the later a frame, the noisier it is, as a file of another package."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_video.models.backbones.denoise import make_denoise_fn, make_text_record
from dit_video.models.conditioning import Conditioning
from dit_video.nn import get_graph_def
from dit_video.tokens import PackedRows, compute_positions, compute_token_grid, patchify, unpatchify
from dit_video.weights.frozen_encoders import open_tokenizer


def roll(pipeline, prompt, size, noise, *, frames, parts=2):
    """Return latents [frames h w c] of which each leaves a window of the size as soon as it is clean.

    Args:
      noise: Standard normal noise, of at least the frames and the window.
      parts: Number of steps in which every frame of the window becomes as clean as the one before it was.
    """
    model = pipeline.config.model
    latents = model.latent_grid(size)
    grid, patch = compute_token_grid(latents, model.backbone.patch), model.backbone.patch
    tokens, each = jnp.asarray(patchify(noise, patch)), grid.h * grid.w
    positions = jnp.asarray(compute_positions(grid, step=(pipeline.config.token_dt, 1.0, 1.0)))[None]
    layout = PackedRows(segments=jnp.ones(positions.shape[:2], jnp.int32), positions=positions, count=1)
    params = pipeline.denoiser_params
    prompt = jnp.asarray(open_tokenizer(model.text_encoder)(prompt))[None]
    context = nnx.merge(get_graph_def(model.text_encoder.make), params["text"])(
        prompt, jnp.ones(prompt.shape, jnp.int32)
    )
    backbone = nnx.merge(get_graph_def(model.backbone.make), params["backbone"])
    denoise = make_denoise_fn(backbone, layout, Conditioning(make_text_record(context, layout)))

    @jax.jit
    def step(window, times, next_times):
        prediction, _ = denoise(window, times, None)
        return window + (next_times - times)[..., None] * prediction  # the velocity of a rectified flow

    def get_times(shift):
        """Return the times of the window's tokens, of which `shift` of a frame has passed."""
        return jnp.repeat(jnp.clip((jnp.arange(grid.t) + 1 - shift) / grid.t, 0, 1), each)[None]

    window, done = tokens[None, : grid.volume], []
    start = [jnp.maximum(get_times(0), 1 - number / grid.t) for number in range(grid.t)]
    for times, next_times in itertools.pairwise(start):  # all are noise at first
        window = step(window, times, next_times)
    while len(done) < frames:
        for part in range(parts):
            window = step(window, get_times(part / parts), get_times((part + 1) / parts))
        done.append(window[0, :each])
        first = grid.volume + (len(done) - 1) * each
        window = jnp.concatenate([window[:, each:], tokens[None, first : first + each]], axis=1)
    return np.concatenate([unpatchify(frame, grid._replace(t=1), patch) for frame in done])
