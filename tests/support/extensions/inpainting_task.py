"""Inpainting of a clip by any text-to-video model, as a file of another package (RePaint, arXiv 2201.09865)."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from dit_video.core.errors import UserError
from dit_video.core.registry import register
from dit_video.sampling import SamplingPlan, StepTransform
from dit_video.sampling.request import Conditioner
from dit_video.tokens import Field


@register
@dataclass(frozen=True)
class KeptLatents(StepTransform):
    """Latents that are kept: after each step they are the clip's, with the noise of its time."""

    def list_fields(self, channels):
        return tuple(Field(name=name, alignment="grid", shape=(channels,)) for name in ("kept", "is_kept"))

    def change_sample(self, sample, inputs):
        kept, is_kept = (inputs.rows.fields[name] for name in ("kept", "is_kept"))
        return jnp.where(is_kept > 0, inputs.process.add_noise(kept, inputs.noise, inputs.time), sample)


@dataclass(frozen=True, kw_only=True)
class Inpainting(Conditioner):
    """Clips that equal `clip` where `generated` (latents `t h w`) is False; the rest starts from its noisy latents."""

    clip: Any
    generated: Any
    start_time: float = 1.0

    def __call__(self, request, model):
        latents = model.codec.encode(self.clip)
        if self.generated.shape != latents.shape[:3]:
            raise UserError(f"generated has the shape {self.generated.shape}; use {latents.shape[:3]}, of the latents")
        is_kept = np.broadcast_to(~self.generated[..., None], latents.shape).astype(np.float32)
        fields = zip(KeptLatents().list_fields(latents.shape[-1]), (latents, is_kept), strict=True)
        return SamplingPlan(dict(fields), start=latents, start_time=self.start_time, transform=KeptLatents())
