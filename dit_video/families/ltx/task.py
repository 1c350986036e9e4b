"""Images and clips at any frame of a clip, as LTX-Video was trained with them.

At frame 0 they are latents of the clip itself, less noisy than the others. Elsewhere an image, or the first two latent
frames of a clip, are extra tokens with the position of their frame, because a latent in the middle of a clip stands for
eight frames, and the latent of an image for one; further latent frames are again those of the clip itself. This is
`LTXConditionPipeline` of diffusers, and `prepare_conditioning` of Lightricks/LTX-Video.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, UInt8

from dit_video.core.errors import UserError
from dit_video.core.rng import key
from dit_video.models.autoencoders import latent_grid
from dit_video.sampling.known_pixels import locate_condition
from dit_video.sampling.pictures import Condition
from dit_video.sampling.plan import ExtraTokens, HeldTokens, SamplingPlan
from dit_video.sampling.request import GenerationTask, Request, TaskModel
from dit_video.tokens import Field, Grid, compute_positions, compute_token_grid, patchify

_PREFIX = 2
"""Number of latent frames of a clip that are extra tokens."""


@dataclass(frozen=True, kw_only=True)
class KeyframesToVideo(GenerationTask):
    """Clips with images and clips at some frames: the request's `image`, `last_image` and `conditions`."""

    noise_scale: float = 0.0
    """Noise that the model sees in conditions of strength 1, in units of the squared time."""
    has_keyframes: bool = True
    """Accepts images and clips at any frame; False for models that were trained with a first image alone (versions
    0.9.0 and 0.9.1)."""

    def __call__(self, request: Request, model: TaskModel) -> SamplingPlan:
        """Return the plan of a request, perhaps without any condition.

        Raises:
          UserError: a condition that the model was not trained with, whose frames are not in the clip, do not fit the
            autoencoder's stride, or have the latents of another condition.
        """
        request.check_pictures(("image", "last_image", "conditions") if self.has_keyframes else ("image",))
        size, stride, channels = request.grid, model.codec.config.stride, model.codec.config.channels
        conditions = list(request.conditions)
        if request.last_image is not None:
            conditions.insert(0, Condition(content=request.last_image, frame=-1))
        if request.image is not None:
            conditions.insert(0, Condition(content=request.image))
        if not conditions:
            return SamplingPlan()
        pixels = [_fit(each, size, stride) for each in conditions]
        transform, grid = HeldTokens(noise_scale=self.noise_scale), latent_grid(size, stride)
        fields = {each: np.zeros(each.get_shape(grid), np.float32) for each in transform.list_fields(channels)}
        held, strength = fields.values()
        extras = []
        for condition, (start, frames) in zip(conditions, pixels, strict=True):
            latents, first, prefix = model.codec.encode_pixels(frames), start // stride.t, 0 if start == 0 else _PREFIX
            if prefix:
                extras.append(_Keyframe(latents[:prefix], start, condition.strength))
            placed = slice(first + prefix, first + len(latents))
            if strength[placed].any():
                rule = "other conditions, or image=, have latents of the same frames"
                raise UserError(f"frame={condition.frame} of a condition is invalid: {rule}. Use one of them.")
            held[placed], strength[placed] = latents[prefix:], condition.strength
        extra = _make_extra_tokens(extras, tuple(fields), request.seed, model) if extras else None
        return SamplingPlan(fields, transform=transform, extra=extra)


class _Keyframe(NamedTuple):
    """Latent frames of a condition that are extra tokens."""

    latents: Float32[np.ndarray, "t h w c"]
    start: int
    """Number of their first frame in the clip."""
    strength: float


def _fit(condition: Condition, size: Grid, stride: Grid) -> tuple[int, UInt8[np.ndarray, "T H W 3"]]:
    """Return the first frame of a condition in the clip, and its frames at the clip's height and width."""
    if condition.mask is not None:
        raise UserError("mask= of a condition is invalid: this model keeps whole frames. Leave it out")
    start, frames = locate_condition(condition, size)
    # Latents of a clip are those of the sampled clip from the third on, so they must stand for the same frames.
    if len(frames) > 1 and start % stride.t:
        below = start - start % stride.t
        fix = f"{below} or {below + stride.t}" if below + stride.t + len(frames) <= size.t else str(below)
        rule = f"a clip of {len(frames)} frames begins at a multiple of {stride.t}"
        raise UserError(f"frame={condition.frame} of a condition is invalid: {rule}. Use {fix}.")
    if (len(frames) - 1) % stride.t:
        below = len(frames) - (len(frames) - 1) % stride.t
        raise UserError(
            f"a condition of {len(frames)} frames is invalid: it must have 1 + {stride.t}k. Use its first {below}."
        )
    return start, frames


def _make_extra_tokens(
    keyframes: list[_Keyframe], fields: tuple[Field, ...], seed: int, model: TaskModel
) -> ExtraTokens:
    """Return the extra tokens of keyframes: their noise, drawn from the request's seed, positions and values."""
    patch, stride, tokens, positions, strengths = model.backbone.patch, model.codec.config.stride, [], [], []
    for latents, start, strength in keyframes:
        tokens.append(patchify(latents, patch))
        grid = compute_token_grid(Grid(*latents.shape[:3]), patch)
        each = compute_positions(grid, step=(model.token_dt, 1.0, 1.0), lead=model.token_lead)
        positions.append(each + np.asarray([start / (stride.t * patch.t) * model.token_dt, 0, 0], np.float32))
        strengths.append(np.full((grid.volume, patch.volume), strength, np.float32))
    values = np.concatenate(tokens)
    noise = np.asarray(jax.random.normal(key(seed, "conditions"), values.shape))
    held, strength_field = fields
    return ExtraTokens(noise, np.concatenate(positions), {held: values, strength_field: np.concatenate(strengths)})
