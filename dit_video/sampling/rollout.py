"""Clips that are made frame by frame, each of actions that are chosen when the frames before are there."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from dit_video.core.errors import UserError
from dit_video.core.offload import copy_to_devices
from dit_video.diffusion import ClipSize, SampleTimes, sample
from dit_video.models.backbones.denoise import make_denoise_fn, make_text_record
from dit_video.models.conditioning import Conditioning
from dit_video.models.encoders import Context
from dit_video.nn import get_graph_def
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.pipeline_config import to_grid
from dit_video.sampling.request import Size
from dit_video.sampling.sampler import draw_initial_noise
from dit_video.sampling.sampling_config import Sampling
from dit_video.tokens import Grid, PackedRows, compute_positions, compute_token_grid, patchify, unpatchify
from dit_video.video import Clip
from dit_video.weights.frozen_encoders import open_tokenizer


class Rollout:
    """A causal model as a simulator: each step samples the next latent frame, from the frames before and an action.

    The keys and values of finished frames are kept, so that a step takes about as long for any frame. Steps are not
    guided.

    Args:
      pipeline: Pipeline of a model with `pattern=CausalFrames()` and a time for each token, trained with one for each
        frame (`time_per="frame"`).
      prompt: Description of the clip.
      size: Frames, height and width of the longest clip; the pipeline's own by default.
      seed: Seed of the noise.
      sampling: Steps and solver for each frame; the pipeline's own by default.

    Raises:
      UserError: If finished frames of the model depend on later ones, its tokens have no times of their own or are of
        several latent frames, or it cannot sample the size.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        prompt: str,
        *,
        size: Size | None = None,
        seed: int = 0,
        sampling: Sampling | None = None,
    ):
        config, model = pipeline.config, pipeline.config.model
        self._pipeline, self._backbone, sampling = pipeline, model.backbone, sampling or config.sampling
        if self._backbone.time != "token" or self._backbone.patch.t > 1:
            rule = "each latent frame of a rollout has a time of its own"
            raise UserError(f"this model cannot roll out: {rule}. Use one with time='token' and patches of one frame")
        latents = model.latent_grid(config.size if size is None else to_grid(size))
        self._grid = compute_token_grid(latents, self._backbone.patch)
        positions = compute_positions(self._grid, step=(config.token_dt, 1.0, 1.0), lead=model.token_lead)
        noise = patchify(draw_initial_noise(seed, latents, self._backbone.channels), self._backbone.patch)
        self._positions, self._noise = (np.split(each, self._grid.t) for each in (positions, noise))
        self._frames: list[Float32[np.ndarray, "1 h w c"]] = []
        self._history: dict[str, list[np.ndarray]] = {each.field.name: [] for each in self._backbone.conditioning}
        params = copy_to_devices(pipeline.denoiser_params)
        self._params, self._graph = params["backbone"], get_graph_def(self._backbone.make)
        self._state = nnx.merge(self._graph, self._params).init_state(1, self._grid.volume)
        tokens = jnp.asarray(open_tokenizer(model.text_encoder)(prompt))[None]
        text = nnx.merge(get_graph_def(model.text_encoder.make), params["text"])
        self._context = text(tokens, jnp.ones(tokens.shape[:2], jnp.int32))
        process = model.process.specialize(ClipSize(frames=self._grid.t, frame_tokens=self._grid.h * self._grid.w))
        options: dict[str, Any] = {"process": process, "prediction": model.prediction, "solver": sampling.solver}
        self._sample = jax.jit(functools.partial(self._sample_frame, times=sampling.make_times(process), **options))

    @property
    def latents(self) -> Float32[np.ndarray, "t h w c"]:
        """Return the latents of all frames so far."""
        return np.concatenate(self._frames)

    @property
    def clip(self) -> Clip:
        """Return the clip so far; before the first step there is none."""
        return self._pipeline.decode(self.latents)

    def step(self, **conditioning: Any) -> Float32[np.ndarray, "1 h w c"]:
        """Sample the next latent frame, and return its latents.

        Args:
          conditioning: Values of the model's conditioning, by name, for the new frames: one in the first step, and as
            many as the autoencoder's stride in the others, such as `actions` of shape [stride, size]. What is left out
            is zero, and must be left out in every step.

        Raises:
          UserError: If the clip has its size already, a name is unknown, or the values do not fit.
        """
        number = len(self._frames)
        if number == self._grid.t:
            raise UserError(f"the clip has all of its {number} latent frames. Use a larger size")
        if unknown := sorted(conditioning.keys() - self._history.keys()):
            names = ", ".join(self._history) or "nothing else"
            raise UserError(f"conditioning {', '.join(unknown)} is unknown to this model; use {names}")
        for name, value in conditioning.items():
            self._history[name].append(np.asarray(value))
        values = {each.field.name: self._make_values(each.field.name) for each in self._backbone.conditioning}
        positions = jnp.asarray(self._positions[number])[None]
        layout = PackedRows(segments=jnp.ones(positions.shape[:2], jnp.int32), positions=positions, count=1)
        noise = jnp.asarray(self._noise[number])[None]
        frame, self._state = self._sample(self._params, self._state, noise, layout, self._context, values)
        self._frames.append(np.asarray(unpatchify(frame[0], self._grid._replace(t=1), self._backbone.patch)))
        return self._frames[-1]

    def _make_values(self, name: str) -> Float32[np.ndarray, "1 n q"]:
        """Return a conditioning's values for the tokens of the next frame, of all values so far."""
        config = self._pipeline.model_parts.conditioning[name]
        patch, tokens = self._backbone.patch, self._grid.h * self._grid.w
        latents = Grid(len(self._frames) + 1, self._grid.h * patch.h, self._grid.w * patch.w)
        values = np.zeros(config.field.get_shape(latents), np.float32)
        if history := self._history[name]:
            values = config.from_request(np.concatenate(history), latents)
        rows = config.field.to_rows(patch).spread(config.field.patchify(values, patch), tokens=tokens * latents.t)
        return rows[None, -tokens:] if config.field.alignment in ("frame", "grid") else rows[None]

    def _sample_frame(
        self,
        params: Any,
        state: Any,
        noise: Float[Array, "1 n p"],
        layout: PackedRows,
        context: Context,
        values: Mapping[str, Array],
        *,
        times: SampleTimes,
        **options: Any,
    ) -> tuple[Float[Array, "1 n p"], Any]:
        """Return the next frame's tokens, and the state that includes it."""
        model, ones = nnx.merge(self._graph, params), jnp.ones((1, 1))
        records = [
            each.prepare(values[each.field.name], layout, jax.random.split(jax.random.key(0), (1, 1)), ones)
            for each in self._backbone.conditioning
        ]
        conditioning = Conditioning(make_text_record(context, layout), *records)
        denoise = make_denoise_fn(model, layout, conditioning)
        arguments = {"model_times": times.model_times, "state": state, **options}
        clean = sample(denoise, noise, jnp.asarray(times.times), **arguments)
        return clean, model.extend(state, clean, layout, conditioning)
