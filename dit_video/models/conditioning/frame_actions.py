"""Conditioning on what happens in every frame: actions, or other numbers such as a speed or a pose."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import Float, Float32

from dit_video.core.errors import UserError, check_at_least
from dit_video.models.conditioning.clip_conditioning import (
    ClipConditioning,
    ClipView,
    find_own_file,
    group_frames,
)
from dit_video.tokens import Field, Grid


@dataclass(frozen=True, kw_only=True)
class FrameActions(ClipConditioning):
    """Numbers of every frame, `actions` in requests: those of frame `k` lead to it from frame `k - 1`.

    A request gives them as `[T size]`, one row for each frame of the sampled clip. Those of the first frame, which
    nothing leads to, count as any others.

    Raises:
      UserError: If there are no numbers.
    """

    folder: str = ""
    """Folder of the training clips' actions, `[T size]` for the frames of each file, in files NAME_OF_THE_CLIP.npy."""
    size: int = 2
    """Number of numbers of a frame."""
    per_latent: int = 1
    """Number of actions that the model reads for a latent, which stands for several frames: means of consecutive ones,
    or as many as there are frames."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, size=self.size, per_latent=self.per_latent)

    @property
    def field(self) -> Field:
        return Field(name="actions", alignment="frame", shape=(self.per_latent * self.size,))

    def from_clip(self, view: ClipView) -> Float32[np.ndarray, "t a"]:
        """Return the values of a training clip.

        Raises:
          MissingError: If there is no file of its actions.
          UserError: If the clip is mirrored, or the file has too few actions, or of another size.
        """
        path = find_own_file(self.folder, view.name, "actions", ".npy")
        if view.is_flipped:
            raise UserError("flips=True is invalid with actions: they say what happens in the clip. Use flips=False.")
        frames = np.rint((view.start + np.arange(len(view.frames))) * view.frame_stride).astype(int)
        actions = np.load(path, allow_pickle=False)
        if actions.ndim != 2 or len(actions) <= frames[-1]:
            rule = f"the clip has {frames[-1] + 1} frames or more, and the file actions of shape {list(actions.shape)}"
            raise UserError(f"{path} is invalid: {rule}. Write [frames, {self.size}].")
        return self.fold(actions[frames], view.stride.t)

    def from_request(self, value: Any, latents: Grid) -> Float32[np.ndarray, "t a"]:
        """Return the values of a request's actions; those after the clip's last frame are left out.

        Raises:
          UserError: If there are fewer than frames, or they are of another size or not finite.
        """
        assert self.codec is not None
        stride = self.codec.config.stride.t
        count, actions = 1 + (latents.t - 1) * stride, np.asarray(value, np.float32)
        if actions.ndim != 2 or len(actions) < count or not np.isfinite(actions).all():
            rule = f"they must be finite numbers [{count}, {self.size}], a row for each frame"
            raise UserError(f"actions of shape {list(actions.shape)} are invalid: {rule}.")
        return self.fold(actions[:count], stride)

    def fold(self, actions: Float[np.ndarray, "T size"], stride: int) -> Float32[np.ndarray, "t a"]:
        """Return the actions of frames as those of latents, of `stride` frames each but the first, which has one.

        Raises:
          UserError: If the actions are of another size, or `per_latent` does not divide the stride.
        """
        if actions.shape[1] != self.size:
            raise UserError(f"size={self.size} is invalid: there are actions of {actions.shape[1]} numbers. Use these.")
        values = group_frames(actions, stride, self.per_latent, f"per_latent={self.per_latent}")
        return rearrange(values, "(t x) a -> t (x a)", x=self.per_latent)
