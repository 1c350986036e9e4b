"""Conditioning on known parts of a clip: their mask, and their latents, which the denoiser reads."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Key, Shaped, UInt8

from dit_video.core.errors import UserError
from dit_video.core.grid import Grid
from dit_video.core.rng import make_generator
from dit_video.core.typing import AnyArray
from dit_video.models.conditioning.masks import ClipMask, FirstAndLastFrame, FirstFrame, MaskGenerator
from dit_video.models.conditioning.records import ImageTokens
from dit_video.tokens import Field, PackedRows

GREY = 127.5
"""Value in 0..255 of unknown pixels, zero in the models' [-1, 1]."""


def blank_unknown(
    frames: UInt8[np.ndarray, "T H W 3"], is_known: Bool[np.ndarray, "T H W"]
) -> Float32[np.ndarray, "T H W 3"]:
    """Return frames in 0..255 that are grey where they are unknown."""
    return np.where(is_known[..., None], frames, np.float32(GREY)).astype(np.float32)


def split_cells(values: Shaped[np.ndarray, "T H W"], stride: Grid) -> Shaped[np.ndarray, "t h w s y x"]:
    """Return the pixels of every latent: `s` frames, `y` rows and `x` columns.

    The first latent frame has a single frame, which is repeated `s` times (Wan, arXiv 2503.20314, section 5.1.1).
    """
    frames = np.concatenate([np.repeat(values[:1], stride.t - 1, axis=0), values])
    t, h, w = (length // step for length, step in zip(frames.shape, stride, strict=True))
    return frames.reshape(t, stride.t, h, stride.h, w, stride.w).transpose(0, 2, 4, 1, 3, 5)


def fold_mask(is_known: Bool[np.ndarray, "T H W"], stride: Grid) -> Float32[np.ndarray, "t h w s"]:
    """Return the mask on the latent grid: the share of known pixels in each of a latent's `s` frames."""
    return split_cells(is_known, stride).mean(axis=(4, 5), dtype=np.float32)


def find_any_known(is_known: Bool[np.ndarray, "T H W"], stride: Grid) -> Bool[np.ndarray, "t h w"]:
    """Return True for the latents with at least one known pixel."""
    return np.any(split_cells(is_known, stride), axis=(3, 4, 5))


def find_known_latents(is_known: Bool[np.ndarray, "T H W"], stride: Grid) -> Bool[np.ndarray, "t h w"]:
    """Return True for the latents whose pixels are all known."""
    return np.all(split_cells(is_known, stride), axis=(3, 4, 5))


def find_partly_known_latents(is_known: Bool[np.ndarray, "T H W"], stride: Grid) -> Bool[np.ndarray, "t h w"]:
    """Return True for the latents with both known and unknown pixels."""
    return find_any_known(is_known, stride) & ~find_known_latents(is_known, stride)


COND_LATENTS, COND_MASK, IMAGE_TOKENS = "cond_latents", "cond_mask", "image_tokens"
"""Names of fields: latents that a denoiser reads as conditioning; the mask of their known pixels; an image encoder's
tokens of the first frame."""


@dataclass(frozen=True, kw_only=True)
class FrameConditioning:
    """Configuration of the task mix: training in which random parts of a clip are known.

    By default the first latent frame is known, except for images. The autoencoder is causal, so the first latent frame
    holds only the clip's first frame.

    Raises:
      UserError: If `prob` is outside [0, 1], there are no masks, or the masks need another `rest`.
    """

    prob: float = 0.5
    """Probability that something is known. Otherwise the clip is generated from its text alone, and latents, mask and
    image tokens are zero. Wan's image-to-video models always get a first frame: 1."""
    rest: Literal["zero", "grey"] = "zero"
    """Conditioning latents of the frames after a known one: zeros, or with `grey` the latents of the clip whose unknown
    pixels are grey, as in Wan's models; these are cached with the clips' own latents. Sampling uses the same
    setting."""
    masks: tuple[MaskGenerator, ...] = (FirstFrame(),)
    """Generators of masks, each with a relative weight; all but that of the first frame need `rest="grey"`."""

    def __post_init__(self):
        if not 0 <= self.prob <= 1:
            raise UserError(f"prob={self.prob} is invalid: a probability must lie in [0, 1]. Use 0.5.")
        if not self.masks:
            raise UserError("masks is empty: something must be known. Use masks=(FirstFrame(),).")
        if self.has_mask_mix and self.rest != "grey":
            raise UserError(f"rest={self.rest!r} is invalid with these masks. Use rest='grey'.")

    @property
    def is_required(self) -> bool:
        """Return whether something of every clip is known, such as its first frame: a sample needs it, too."""
        return self.prob == 1

    @property
    def has_mask_mix(self) -> bool:
        """Return whether masks are drawn as examples are read, and clips are encoded with unknown pixels grey."""
        return tuple(map(type, self.masks)) != (FirstFrame,)

    def accepts(self, generated: ClipMask) -> bool:
        """Return whether a model trained with this conditioning can generate what is True in a mask.

        Wan's models also accept a last frame with the first one.
        """
        further = (FirstAndLastFrame(),) if self.rest == "grey" else ()
        return any(mask.accepts(generated) for mask in (*self.masks, *further))

    def draw_kind(self, seed: int, example: int) -> int | None:
        """Return the number of the mask that an example is trained with; None if nothing is known.

        Args:
          seed: Seed of the run.
          example: Running number of the example in the data plan, which differs from step to step.
        """
        generator = make_generator(seed, "kind of mask", example)
        if generator.random() >= self.prob:
            return None
        weights = np.array([mask.weight for mask in self.masks])
        return int(generator.choice(len(weights), p=weights / weights.sum(axis=0)))

    def draw_mask(self, layout: PackedRows, keys: Key[Array, "B G"]) -> Bool[Array, "B N"]:
        """Return True for the tokens of known frames, drawn from the keys of the examples."""
        return mask_first_frames(layout, jax.vmap(jax.vmap(jax.random.uniform))(keys) < self.prob)


def make_mask_fields(*, channels: int, temporal_stride: int, kind: int | None = None) -> tuple[Field, Field]:
    """Return the fields of conditioning latents and of their mask, which holds the shares of known pixels.

    Args:
      channels: Channels of the latents.
      temporal_stride: Frames of a latent.
      kind: Number of the mask kind, if several are cached; None for the kind that an example is trained with.
    """
    suffix = "" if kind is None else f"_{kind}"
    latents = Field(name=COND_LATENTS + suffix, alignment="grid", shape=(channels,))
    return latents, Field(name=COND_MASK + suffix, alignment="grid", shape=(temporal_stride,))


def mask_first_frames(layout: PackedRows, is_conditioned: Bool[Array, "B G"]) -> Bool[Array, "B N"]:
    """Return the mask of the first latent frame's tokens in the chosen segments that have more than one frame."""
    frame_positions = jnp.asarray(layout.positions[..., 0])
    is_video = layout.max(frame_positions) > 0
    return layout.expand(is_conditioned & is_video) & (frame_positions == 0) & (layout.segments > 0)


def make_image_tokens(values: Float[AnyArray, "B I F"], layout: PackedRows) -> ImageTokens:
    """Return the record of a batch's image tokens; every segment has `I / G` tokens."""
    return ImageTokens(jnp.asarray(values), layout.get_sequence_segments(values.shape[1] // layout.count))


def make_cond_latents(
    latents: Float[AnyArray, "B N p"],
    cond_mask: Bool[Array, "B N"],
    *,
    patch_volume: int,
    channels: int,
    visible: Bool[Array, "B N"] | None = None,
) -> Float[Array, "B N g"]:
    """Return the conditioning channels of tokens: at each patch position the mask, then latents, zero if not visible.

    The channels are in the order of Wan's image-to-video models (arXiv 2503.20314, section 5.1).

    Args:
      latents: The latents, as tokens.
      cond_mask: Mask of the known tokens.
      patch_volume: Number of latent positions in a patch.
      channels: Number of mask and latent channels together; the channels that latents do not fill belong to the mask.
      visible: Mask of the tokens whose latents are visible; the known ones by default.
    """
    mask_channels = channels - latents.shape[-1] // patch_volume
    masks = jnp.broadcast_to(cond_mask[..., None], (*cond_mask.shape, patch_volume * mask_channels))
    values = jnp.where((cond_mask if visible is None else visible)[..., None], latents, 0)
    return interleave_mask(masks.astype(jnp.float32), values, patch_volume=patch_volume)


def interleave_mask(
    mask: Float[AnyArray, "B N m"], latents: Float[AnyArray, "B N p"], *, patch_volume: int
) -> Float[Array, "B N g"]:
    """Return the conditioning channels of tokens: at each patch position the mask's, then the latents'."""
    parts = [jnp.asarray(values).reshape(*values.shape[:2], patch_volume, -1) for values in (mask, latents)]
    return jnp.concatenate(parts, axis=-1).reshape(*latents.shape[:2], -1)
