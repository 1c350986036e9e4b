"""Conditioning on the style of a frame, by an encoder in the folder of the run, as a file of another package."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_video.core.errors import MissingError
from dit_video.core.registry import register
from dit_video.models.conditioning import ClipConditioning
from dit_video.tokens import Field


@register
@dataclass(frozen=True, kw_only=True)
class StyleEncoder(ClipConditioning):
    """A vector of a frame's colours: the first of a training clip, or an image that a request gives."""

    weights: str = "style.npy"

    field = Field(name="style", alignment="example", shape=(6,))

    def open(self, folder):
        if not (folder / self.weights).is_file():
            raise MissingError(f"{folder / self.weights} does not exist. Put the style encoder's weights there.")
        return OpenStyleEncoder(**vars(self), kernel=np.load(folder / self.weights))

    def from_clip(self, view):
        return self.from_request(view.frames[0], view.latents)

    def from_request(self, value, latents):
        raise AssertionError("only what is open encodes")


@dataclass(frozen=True, kw_only=True)
class OpenStyleEncoder(StyleEncoder):
    kernel: Any

    def from_request(self, value, latents):
        colors = np.asarray(value, np.float32).mean(axis=(0, 1)) / 127.5 - 1
        return np.tanh(colors @ self.kernel).astype(np.float32)
