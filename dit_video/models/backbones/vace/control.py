"""Control of VACE (arXiv 2503.07598, section 3.2): latents of what a clip keeps and of what is changed, and the mask.

The channels of a latent position are, in this order: the latents of the clip with all that is generated grey
(inactive), those of the clip with all that is kept grey (reactive), and one mask channel for each pixel of a frame that
the position covers, 1 where pixels are generated.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Float32, Key, Shaped

from dit_video.core.errors import UserError, check_at_least
from dit_video.models.conditioning import ClipConditioning, ClipView
from dit_video.tokens import Field, Grid, PackedRows

NAME = "control"
"""Name of the conditioning, of which requests set the strengths."""


class ControlLatents(NamedTuple):
    """Control of the clips at their tokens, and the strengths of the control layers."""

    values: Float[Array, "B N q"]
    """Latents and masks, patchified like the noisy latents."""
    strengths: Float[Array, "B G J"]
    """Factors of the hints that the control layers add."""


@dataclass(frozen=True, kw_only=True)
class VaceControl(ClipConditioning):
    """Control latents of VACE. Training keeps the first frame of some clips, and generates everything else.

    `dropout` is the probability that a clip's first frame is not kept; it is then generated from its text alone, as an
    image always is.

    Raises:
      UserError: no channels or no layers, or a dropout that is no probability below 1.
    """

    latent_channels: int = 16
    """Number of channels of the autoencoder's latents."""
    mask_channels: int = 64
    """Number of channels of the mask: the pixels of a frame that a latent position covers."""
    layers: int = 15
    """Number of control layers, each of which has a strength of its own."""
    dropout: float = 0.5
    record = ControlLatents
    encoded_prefixes = (0, 1)

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, latent_channels=self.latent_channels, mask_channels=self.mask_channels, layers=self.layers)

    @property
    def channels(self) -> int:
        """Return the number of channels of both latents and the mask."""
        return 2 * self.latent_channels + self.mask_channels

    @property
    def field(self) -> Field:
        return Field(name=NAME, alignment="grid", shape=(self.channels,))

    @property
    def strength_shape(self) -> tuple[int, ...]:
        return (self.layers,)

    def from_clip(self, view: ClipView) -> Float32[np.ndarray, "t h w q"]:
        """Return the control of a clip of which the first frame is kept, or of an image, which is generated.

        Raises:
          UserError: the autoencoder's latents and its stride make other numbers of channels.
        """
        is_generated = np.ones(view.frames.shape[:3], bool)
        kept = int(len(view.frames) > 1)
        is_generated[:kept] = False
        return self.concatenate(view.encoded[kept], view.encoded[0], is_generated)

    def from_request(self, value: Any, latents: Grid) -> np.ndarray:
        """Refuse the value: a request holds the clips and the mask of which the control is made.

        Raises:
          UserError: always.
        """
        raise UserError(
            f"conditioning={{{NAME!r}: …}} is invalid. Use control=, video= with mask=, or reference_images="
        )

    def prepare(
        self, values: Array, layout: PackedRows, keys: Key[Array, "B G"], strength: Float[Array, "B G J"] | None
    ) -> ControlLatents:
        """Return the record of a batch; in training the first frames of some clips are not kept."""
        values = jnp.asarray(values, jnp.float32)
        if strength is not None:
            return ControlLatents(values, strength)
        is_dropped = layout.expand(jax.vmap(jax.vmap(jax.random.uniform))(keys) < self.dropout)
        by_position = values.reshape(*values.shape[:2], -1, self.channels)
        reactive = by_position[..., self.latent_channels : 2 * self.latent_channels]
        # Nothing is kept: both clips are grey, and all pixels are generated.
        nothing = jnp.concatenate([reactive, reactive, jnp.ones_like(by_position[..., -self.mask_channels :])], axis=-1)
        kept = jnp.where(is_dropped[..., None], nothing.reshape(values.shape), values)
        return ControlLatents(kept, jnp.ones((len(values), layout.count, self.layers)))

    def concatenate(
        self,
        inactive: Float32[np.ndarray, "t h w c"],
        reactive: Float32[np.ndarray, "t h w c"],
        is_generated: Bool[np.ndarray, "T H W"],
    ) -> Float32[np.ndarray, "t h w q"]:
        """Return the control of a clip from the latents of its two parts and its pixels that are generated.

        Raises:
          UserError: the latents and the mask have other numbers of channels.
        """
        mask = fold_pixel_mask(is_generated, Grid(*inactive.shape[:3])).astype(np.float32)
        widths = (inactive.shape[-1], mask.shape[-1])
        if widths != (self.latent_channels, self.mask_channels):
            raise UserError(
                f"the denoiser reads control of {self.latent_channels} latent and {self.mask_channels} mask channels, "
                f"but this autoencoder makes {widths[0]} and {widths[1]}; use the one that it was trained with"
            )
        return np.concatenate([inactive, reactive, mask], axis=-1)


def fold_pixel_mask(mask: Shaped[np.ndarray, "T H W"], latents: Grid) -> Shaped[np.ndarray, "t h w s"]:
    """Return a mask of pixels on the latents' grid: the pixels of one frame that each position covers, row by row.

    The frame is the one in the middle of those between two latent frames, so that the mask of a single first frame has
    no effect, only its pixels have: the models were trained so (`nearest-exact` in PyTorch).
    """
    frames = (2 * np.arange(latents.t) + 1) * len(mask) // (2 * latents.t)
    return rearrange(mask[frames], "t (h y) (w x) -> t h w (y x)", h=latents.h, w=latents.w)
