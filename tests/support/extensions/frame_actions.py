"""A causal model that actions steer and that is sampled frame by frame, as a file of another package."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_video.core.registry import register
from dit_video.diffusion import Heun, sample
from dit_video.models.backbones.denoise import make_denoise_fn, make_text_record
from dit_video.models.conditioning import ClipConditioning, Conditioning
from dit_video.nn import get_graph_def
from dit_video.tokens import Field, PackedRows, compute_positions, compute_token_grid, unpatchify
from dit_video.weights.frozen_encoders import open_tokenizer


@register
@dataclass(frozen=True, kw_only=True)
class FrameActions(ClipConditioning):
    """Two numbers in every latent frame: here the mean brightness and its change."""

    field = Field(name="actions", alignment="frame", shape=(2,))

    def from_clip(self, view):
        brightness = view.frames.mean(axis=(1, 2, 3))[:: max(1, (len(view.frames) - 1) // max(1, view.latents.t - 1))]
        brightness = brightness[: view.latents.t] / 255
        return self.from_request(np.stack([brightness, np.gradient(np.append(brightness, 0))[:-1]], axis=-1), view)

    def from_request(self, value, latents):
        return np.asarray(value, np.float32)


class World:
    """A pipeline's denoiser as a simulator: it samples the next frame of a clip from an action."""

    def __init__(self, pipeline, prompt, size):
        config, model = pipeline.config, pipeline.config.model
        self.patch, self.latents = model.backbone.patch, model.latent_grid(size)
        self.grid = compute_token_grid(self.latents, self.patch)
        self.frame = self.grid.h * self.grid.w
        self.positions = compute_positions(self.grid, step=(config.token_dt, 1.0, 1.0))[None]
        self.graph = get_graph_def(model.backbone.make)
        text = nnx.merge(get_graph_def(model.text_encoder.make), pipeline.denoiser_params["text"])
        tokens = jnp.asarray(open_tokenizer(model.text_encoder)(prompt))[None]
        self.context = text(tokens, jnp.ones(tokens.shape, jnp.int32))
        self.process, self.times = model.process, jnp.linspace(1, 0, 4)
        self.sample_next, self.sample_last = jax.jit(self._sample_next), jax.jit(self._sample_last)

    def describe(self, actions, first, last):
        """Return layout and conditioning of some frames."""
        tokens = slice(first * self.frame, last * self.frame)
        positions = jnp.asarray(self.positions[:, tokens])
        layout = PackedRows(segments=jnp.ones(positions.shape[:2], jnp.int32), positions=positions, count=1)
        values = jnp.repeat(jnp.asarray(actions, jnp.float32)[first:last], self.frame, axis=0)[None]
        return layout, Conditioning(make_text_record(self.context, layout), FrameActions.record(values))

    def _sample_next(self, params, state, noise, layout, conditioning):
        """Return the next frame and the state that includes it."""
        model = nnx.merge(self.graph, params)
        denoise = make_denoise_fn(model, layout, conditioning)

        def denoise_frame(noisy, time, state):
            return denoise(noisy, jnp.full(noisy.shape[:2], time), state)

        clean = sample(denoise_frame, noise, self.times, process=self.process, solver=Heun(), state=state)
        return clean, model.extend(state, clean, layout, conditioning)

    def _sample_last(self, params, clean, noise, layout, conditioning):
        """Return the frame after clean ones, which each step computes again, at time 0."""
        denoise = make_denoise_fn(nnx.merge(self.graph, params), layout, conditioning)

        def denoise_last(noisy, time, state):
            tokens = jnp.concatenate([clean, noisy], axis=1)
            is_clean = jnp.arange(tokens.shape[1])[None] < clean.shape[1]
            prediction, _ = denoise(tokens, jnp.where(is_clean, 0.0, time), None)
            return prediction[:, clean.shape[1] :], state

        return sample(denoise_last, noise, self.times, process=self.process, solver=Heun())

    def sample_clip(self, params, noise, actions, *, cached):
        """Return the tokens of a clip, of which every frame is computed once if keys and values are cached."""
        state = nnx.merge(self.graph, params).init_state(1, self.grid.volume)
        clean = noise[:, :0]
        for number in range(self.grid.t):
            part = noise[:, number * self.frame : (number + 1) * self.frame]
            if cached:
                frame, state = self.sample_next(params, state, part, *self.describe(actions, number, number + 1))
            else:
                frame = self.sample_last(params, clean, part, *self.describe(actions, 0, number + 1))
            clean = jnp.concatenate([clean, frame], axis=1)
        return clean

    def to_latents(self, tokens):
        return np.asarray(unpatchify(tokens[0], self.grid, self.patch))
