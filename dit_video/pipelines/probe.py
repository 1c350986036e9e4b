"""A trained model taken apart: its denoiser as the function that diffusion knows, and where its tokens look."""

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
    """A pipeline's denoiser on clips of one size, each with a row and a prompt of its own.

    `denoise(noisy, time)` is what `diffusion` takes: to its estimates, losses and samplers.

    Args:
      pipeline: of the model.
      prompts: one a clip (B); the empty one is no prompt.
      size: of the clips, frames, height and width in pixels; the training size by default.

    Raises:
      UserError: no prompts, a size that the model can't make, or a model that is given more than noise and a prompt.
    """

    def __init__(self, pipeline: Pipeline, prompts: Sequence[str], size: tuple[int, int, int] | None = None):
        config = pipeline.config
        if not prompts:
            raise UserError("a clip needs a prompt; name one, the empty one is none")
        if config.boundary is not None or config.dit.given_channels or config.dit.time == "token":
            raise UserError(
                "one model that is given noise and a prompt is taken apart here, none with experts or given frames"
            )
        latents = config.latent_grid(config.size if size is None else as_grid(size))
        self.patch, self.channels = config.dit.patch, config.autoencoder.channels
        self.latents, self.grid = latents, token_grid(latents, config.dit.patch)
        """sizes of a clip's latents, and of its tokens"""
        self.process = config.process.for_size(ClipSize(frames=self.grid.t, frame_tokens=self.grid.h * self.grid.w))
        """what the model was trained on, at clips of this size"""
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
        places = coordinates(self.grid, step=(pipeline.config.interval, 1.0, 1.0))
        width = self.patch.volume * self.channels
        rows = [
            pack(
                [Item(np.zeros((self.grid.volume, width), np.float32), places, text, number)],
                shape,
                width=width,
                text_width=text.shape[1] if text.ndim == 2 else 0,
            )
            for number, text in enumerate(texts)
        ]
        return Rows(*map(np.stack, zip(*rows, strict=True)))

    def tokens(self, latents: Float[SameArray, "*B t h w c"]) -> Float[SameArray, "*B n p"]:
        """Latents as the denoiser takes them."""
        return patchify(latents, self.patch)

    def untokens(self, tokens: Float[SameArray, "*B n p"]) -> Float[SameArray, "*B t h w c"]:
        """The latents of tokens."""
        return unpatchify(tokens, self.grid, self.patch)

    def denoise(self, noisy: Float[Array, "B n p"], time: Float[Array, "*time"]) -> Float[Array, "B n prediction"]:
        """The model's prediction at one time for all clips, or at times that broadcast to `[B n]`; without guidance.

        It has the width of `noisy`, or twice that where the model predicts a variance too, which comes behind.
        """
        return self._denoise(noisy, jnp.broadcast_to(time, noisy.shape[:2]))

    def attention_maps(
        self, noisy: Float[Array, "B n p"], time: Float[Array, ""] | float, *, queries: Sequence[int]
    ) -> Float32[np.ndarray, "L B K Q M"]:
        """How much of each token (M) some (Q) take in each layer and head; see `dit.attention_maps`.

        Raises:
          UserError: a query that is no token's number.
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
        """The number of the token that holds a place: a latent frame, and fractions of the height and of the width."""
        frame, down, across = pixel
        at = Grid(int(frame) // self.patch.t, int(down * self.grid.h), int(across * self.grid.w))
        if not all(0 <= index < length for index, length in zip(at, self.grid, strict=True)):
            raise UserError(f"{pixel} lies outside of {self.latents.t} latent frames; fractions are from 0 to below 1")
        return (at.t * self.grid.h + at.h) * self.grid.w + at.w
