"""Inspection of a trained model: its denoiser as a function for `diffusion`, and its attention maps."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from dit_video.core.errors import UserError
from dit_video.core.offload import copy_to_devices
from dit_video.core.typing import SameArray
from dit_video.diffusion import ClipSize
from dit_video.models.backbones.attention_maps import compute_attention_maps
from dit_video.models.backbones.denoise import make_denoise_fn, make_text_record
from dit_video.models.conditioning import Conditioning
from dit_video.nn import get_graph_def
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.pipeline_config import to_grid
from dit_video.tokens import (
    Grid,
    PackedBatch,
    PackedExample,
    PackedShape,
    compute_positions,
    compute_token_grid,
    pack,
    patchify,
    stack_rows,
    unpatchify,
)
from dit_video.weights.frozen_encoders import open_tokenizer


class DenoiserProbe:
    """A pipeline's denoiser for clips of one size, each in a row of its own with a prompt of its own.

    `denoise` is the denoiser that the estimates, losses and samplers of `diffusion` accept.

    Args:
      pipeline: The model's pipeline.
      prompts: One prompt a clip (B); an empty prompt samples without condition.
      size: Frames, height and width of the clips in pixels; the training size by default.

    Raises:
      UserError: If there are no prompts, the size is not supported, or the model has two experts or conditioning
        frames.
    """

    def __init__(self, pipeline: Pipeline, prompts: Sequence[str], size: tuple[int, int, int] | None = None):
        config = pipeline.config
        if not prompts:
            raise UserError("prompts is empty: each clip needs a prompt; name one, or '' to sample without condition")
        if config.boundary is not None or config.model.backbone.cond_channels or config.model.backbone.time == "token":
            raise UserError("this model has two experts or conditioning frames; use a plain text-to-video model")
        latents = config.model.latent_grid(config.size if size is None else to_grid(size))
        self.patch, self.channels = config.model.backbone.patch, config.model.autoencoder.channels
        self.latent_grid, self.token_grid = latents, compute_token_grid(latents, config.model.backbone.patch)
        """Latent grid, and token grid, of a clip."""
        grid = self.token_grid
        self.process = config.model.process.specialize(ClipSize(frames=grid.t, frame_tokens=grid.h * grid.w))
        """Process that the model was trained on, for clips of this size."""
        params = copy_to_devices(pipeline.denoiser_params)
        self.backbone = nnx.merge(get_graph_def(config.model.backbone.make), params["backbone"])
        rows = self._pack_prompts(prompts, pipeline)
        text = nnx.merge(get_graph_def(config.model.text_encoder.make), params["text"])
        context = text(jnp.asarray(rows.text), jnp.asarray(rows.text_segments))
        self._layout = jax.tree.map(jnp.asarray, rows.layout)
        self._conditioning = Conditioning(make_text_record(context, self._layout))
        self._denoise = make_denoise_fn(self.backbone, self._layout, self._conditioning)

    def _pack_prompts(self, prompts: Sequence[str], pipeline: Pipeline) -> PackedBatch:
        config = pipeline.config
        tokenizer = open_tokenizer(config.model.text_encoder)
        texts = [tokenizer(prompt) for prompt in prompts]
        shape = PackedShape(tokens=self.token_grid.volume, text=max(map(len, texts)), segments=1)
        positions = compute_positions(self.token_grid, step=(config.token_dt, 1.0, 1.0), lead=config.model.token_lead)
        width = self.patch.volume * self.channels
        tokens = np.zeros((self.token_grid.volume, width), np.float32)
        rows = []
        for number, text in enumerate(texts):
            text_width = text.shape[1] if text.ndim == 2 else 0
            example = PackedExample(tokens, positions, text, number)
            rows.append(pack([example], shape, width=width, text_width=text_width))
        return stack_rows(rows)

    def patchify(self, latents: Float[SameArray, "*B t h w c"]) -> Float[SameArray, "*B n p"]:
        """Convert latents to the denoiser's tokens."""
        return patchify(latents, self.patch)

    def unpatchify(self, tokens: Float[SameArray, "*B n p"]) -> Float[SameArray, "*B t h w c"]:
        """Convert tokens to latents."""
        return unpatchify(tokens, self.token_grid, self.patch)

    def denoise(
        self, noisy: Float[Array, "B n p"], time: Float[Array, "*time"], state: Any = None
    ) -> tuple[Float[Array, "B n prediction"], Any]:
        """Predict at one time for all clips, or at times that broadcast to `[B n]`, without guidance.

        The prediction has the width of `noisy`, or twice that where the model also predicts a variance, which comes
        last. The state is the model's; None for one without, or before the first step.
        """
        return self._denoise(noisy, jnp.broadcast_to(time, noisy.shape[:2]), state)

    def compute_attention_maps(
        self, noisy: Float[Array, "B n p"], time: Float[Array, ""] | float, *, queries: Sequence[int]
    ) -> Float32[np.ndarray, "L B K Q M"]:
        """Return how much some tokens (Q) attend to every token (M), by layer and head; see `backbones.attention_maps`.

        Raises:
          UserError: If a query is not the number of a token.
        """
        times = jnp.full((noisy.shape[0], 1), time, jnp.float32)
        return compute_attention_maps(self.backbone, noisy, times, self._layout, self._conditioning, queries=queries)

    def find_token(self, position: tuple[int, float, float]) -> int:
        """Return the number of the token at a latent frame and at fractions of the height and of the width."""
        frame, y, x = position
        token = Grid(int(frame) // self.patch.t, int(y * self.token_grid.h), int(x * self.token_grid.w))
        if not all(0 <= index < length for index, length in zip(token, self.token_grid, strict=True)):
            frames = self.latent_grid.t
            raise UserError(f"{position} lies outside of {frames} latent frames; fractions are from 0 to below 1")
        return (token.t * self.token_grid.h + token.h) * self.token_grid.w + token.w
