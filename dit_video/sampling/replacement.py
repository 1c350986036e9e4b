"""Training-free completion: known parts of a sample are replaced after every step by their own noisy latents.

Any model completes clips in this way (RePaint, arXiv 2201.09865, and before it arXiv 2011.13456, appendix I.2).
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from dit_video.data.latents.codec import LatentCodec
from dit_video.sampling.known_pixels import KnownPixels
from dit_video.sampling.plan import HELD_LATENTS, HELD_STRENGTH, BlockEnd, LatentUpdate, StepInputs, StepTransform
from dit_video.tokens import Field

_TIME_TOLERANCE = 1e-6
"""Rounding of times, within which a latent is released."""


@dataclass(frozen=True, kw_only=True)
class LatentReplacement(StepTransform):
    """Known latents, which are noised with the sample's initial noise to its time after every step.

    Latents of a strength below 1 are released at the time `1 - strength`, and are denoised with the others from then
    on.
    """

    def list_fields(self, channels: int) -> tuple[Field, ...]:
        return (
            Field(name=HELD_LATENTS, alignment="grid", shape=(channels,)),
            Field(name=HELD_STRENGTH, alignment="grid", shape=(1,)),
        )

    def change_sample(self, sample: Float[Array, "B N p"], inputs: StepInputs) -> Float[Array, "B N p"]:
        """Replace the known latents that are not released yet."""
        rows, time = inputs.rows, inputs.time
        strength = jnp.asarray(rows.fields[HELD_STRENGTH])
        is_held = (strength > 0) & (time >= 1 - strength - _TIME_TOLERANCE)
        known = inputs.process.add_noise(jnp.asarray(rows.fields[HELD_LATENTS]), jnp.asarray(rows.tokens), time)
        # A patch has one strength for each position, and the latents' channels for each.
        is_held = jnp.repeat(is_held, sample.shape[-1] // strength.shape[-1], axis=-1)
        return jnp.where(is_held, known, sample)


@dataclass(frozen=True, kw_only=True, eq=False)
class PixelReplacement(LatentUpdate):
    """Known pixels of latents that also stand for, or depend on, unknown ones.

    They are keyframes that are off the temporal stride, and pixels at the border of a region.

    The data that a block of steps leads to are decoded, the known pixels are put in place, and what is encoded of the
    result takes the place of these latents, with the sample's own noise.
    """

    known: KnownPixels
    is_replaced: Bool[np.ndarray, "t h w"]
    """True for the latents that are replaced."""
    codec: LatentCodec

    def __call__(self, latents: Float32[np.ndarray, "t h w c"], end: BlockEnd) -> Float32[np.ndarray, "t h w c"]:
        """Return the latents with those of the known frames, which a strength releases as for `LatentReplacement`."""
        is_kept = self.known.is_known & (end.time >= 1 - self.known.strength - _TIME_TOLERANCE)
        if not is_kept.any():
            return latents
        decoded = self.codec.decode(end.data, fps=1.0).frames
        pixels = np.where(is_kept[..., None], self.known.frames, decoded)
        replaced = end.combine(self.codec.encode_pixels(pixels), end.noise)
        return np.where(self.is_replaced[..., None], replaced, latents)
