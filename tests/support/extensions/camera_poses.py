"""Conditioning on a camera's path, as a file of another package."""

from dataclasses import dataclass

import numpy as np

from dit_video.core.errors import UserError
from dit_video.core.registry import register
from dit_video.models.conditioning import ClipConditioning
from dit_video.tokens import Field


@register
@dataclass(frozen=True, kw_only=True)
class CameraPoses(ClipConditioning):
    """Pose of the camera [R | t] in every latent frame, which the name of a clip says here."""

    field = Field(name="camera", alignment="frame", shape=(3, 4))

    def from_clip(self, view):
        speed = (sum(map(ord, view.name)) % 5 - 2) * (-1 if view.is_flipped else 1)
        return self.from_request(speed, view.latents)

    def from_request(self, value, latents):
        if not np.isscalar(value):
            raise UserError(f"camera={value!r} is invalid; give its speed, a number")
        poses = np.zeros((latents.t, 3, 4), np.float32)
        poses[:, :, :3], poses[:, 0, 3] = np.eye(3), value * np.arange(latents.t)
        return poses
