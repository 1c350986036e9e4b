"""Inspection of a trained model: its denoiser as a function for `diffusion`, and its attention maps."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from dit_video.backbones.denoise import packed_denoise
from dit_video.backbones.dit import Given, attention_maps
from dit_video.core.errors import UserError
from dit_video.core.typing import SameArray
from dit_video.diffusion import ClipSize
from dit_video.encoders.text import open_tokenizer
from dit_video.nn import graph_of
from dit_video.pipelines.config import as_grid
from dit_video.pipelines.pipeline import Pipeline
from dit_video.tokens import Grid, Item, Rows, RowShape, coordinates, pack, patchify, token_grid, unpatchify


class ClipDenoiser:
    """A pipeline's denoiser for clips of one size, each in a row of its own with a prompt of its own.

    `denoise(noisy, time)` is the denoiser that the estimates, losses and samplers of `diffusion` accept.

    Args:
      pipeline: the model's pipeline.
      prompts: one prompt a clip (B); an empty prompt samples without condition.
      size: frames, height and width of the clips in pixels; the training size by default.

    Raises:
      UserError: no prompts, an unsupported size, or a model with two experts or conditioning frames.
    """

    def __init__(self, pipeline: Pipeline, prompts: Sequence[str], size: tuple[int, int, int] | None = None):
        config = pipeline.config
        if not prompts:
            raise UserError("prompts is empty: each clip needs a prompt; name one, or '' to sample without condition")
        if config.boundary is not None or config.dit.given_channels or config.dit.time == "token":
            raise UserError(
                "this model has two experts or conditioning frames; use a text-to-video model with one denoiser"
            )
        latents = config.latent_grid(config.size if size is None else as_grid(size))
        self.patch, self.channels = config.dit.patch, config.autoencoder.channels
        self.latents, self.grid = latents, token_grid(latents, config.dit.patch)
        """Latent grid, and token grid, of a clip."""
        self.process = config.process.for_size(ClipSize(frames=self.grid.t, frame_tokens=self.grid.h * self.grid.w))
        """Process that the model was trained on, for clips of this size."""
        params = jax.tree.map(jnp.asarray, pipeline.denoiser_params)
        self.dit = nnx.merge(graph_of(config.dit.make), params["dit"])
        self._rows = self._packed(prompts, pipeline)
        text = nnx.merge(graph_of(config.text.make), params["text"])
        self._context = text(jnp.asarray(self._rows.text), jnp.asarray(self._rows.text_segments))
        self._given = Given(labels=self._context.classes(1))
        self._denoise = packed_denoise(
            self.dit,
            segments=self._rows.segments,
            coordinates=self._rows.coordinates,
            context=self._context.values,
            context_segments=self._context.segments,
            count=1,
            given=self._given,
        )

    def _packed(self, prompts: Sequence[str], pipeline: Pipeline) -> Rows:
        tokenizer = open_tokenizer(pipeline.config.text)
        texts = [tokenizer(prompt) for prompt in prompts]
        shape = RowShape(tokens=self.grid.volume, text=max(map(len, texts)), segments=1)
        positions = coordinates(self.grid, step=(pipeline.config.interval, 1.0, 1.0))
        width = self.patch.volume * self.channels
        rows = [
            pack(
                [Item(np.zeros((self.grid.volume, width), np.float32), positions, text, number)],
                shape,
                width=width,
                text_width=text.shape[1] if text.ndim == 2 else 0,
            )
            for number, text in enumerate(texts)
        ]
        return Rows(*map(np.stack, zip(*rows, strict=True)))

    def tokens(self, latents: Float[SameArray, "*B t h w c"]) -> Float[SameArray, "*B n p"]:
        """Convert latents to the denoiser's tokens."""
        return patchify(latents, self.patch)

    def untokens(self, tokens: Float[SameArray, "*B n p"]) -> Float[SameArray, "*B t h w c"]:
        """Convert tokens to latents."""
        return unpatchify(tokens, self.grid, self.patch)

    def denoise(self, noisy: Float[Array, "B n p"], time: Float[Array, "*time"]) -> Float[Array, "B n prediction"]:
        """Predict at one time for all clips, or at times that broadcast to `[B n]`, without guidance.

        The prediction has the width of `noisy`, or twice that where the model also predicts a variance, which comes
        last.
        """
        return self._denoise(noisy, jnp.broadcast_to(time, noisy.shape[:2]))

    def attention_maps(
        self, noisy: Float[Array, "B n p"], time: Float[Array, ""] | float, *, queries: Sequence[int]
    ) -> Float32[np.ndarray, "L B K Q M"]:
        """Return how much some tokens (Q) attend to every token (M), by layer and head; see `dit.attention_maps`.

        Raises:
          UserError: a query that is not the number of a token.
        """
        return attention_maps(
            self.dit,
            noisy,
            jnp.full((noisy.shape[0], 1), time, jnp.float32),
            queries=queries,
            segments=jnp.asarray(self._rows.segments),
            coordinates=jnp.asarray(self._rows.coordinates),
            context=self._context.values,
            context_segments=self._context.segments,
            given=self._given,
        )

    def token_at(self, pixel: tuple[int, float, float]) -> int:
        """Return the number of the token at a latent frame and at fractions of the height and of the width."""
        frame, y, x = pixel
        token = Grid(int(frame) // self.patch.t, int(y * self.grid.h), int(x * self.grid.w))
        if not all(0 <= index < length for index, length in zip(token, self.grid, strict=True)):
            raise UserError(f"{pixel} lies outside of {self.latents.t} latent frames; fractions are from 0 to below 1")
        return (token.t * self.grid.h + token.h) * self.grid.w + token.w
