"""Frozen CLIP whose image tokens some denoisers attend to; its weights are read when it is opened."""

import functools
import hashlib
import json
import os
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8

from dit_video.core.config_json import to_json
from dit_video.core.errors import UserError
from dit_video.core.files import read_json, write_json
from dit_video.core.offload import Offload
from dit_video.models.features import FrameEncoder
from dit_video.models.features.clip import FeatureName
from dit_video.weights import load_clip_image_processor, load_clip_vision, read_clip_vision_config
from dit_video.weights.parameter import get_placement

IDENTITY_FILE = "image_encoder.json"
"""Name of the file in a run's folder that holds the identity of its image encoder."""
FEATURE: FeatureName = "penultimate"
"""Feature of a CLIP that denoisers read."""


class FrozenImageEncoder:
    """Image tokens of frames: the penultimate hidden states of a CLIP's vision tower, as in Wan's image-to-video.

    It is opened at the first frame.

    Args:
      folder: folder of the tower, with its image settings in it or next to it, or of the pipeline that it is part of.
      identity: identity of tower and settings that the folder must hold; any if empty.
      offload: weights in host memory; None for weights that stay on the device.
    """

    def __init__(self, folder: str | os.PathLike, *, identity: str = "", offload: Offload | None = None):
        self._folder, self._identity, self._offload = Path(folder), identity, offload

    @property
    def identity(self) -> str:
        """Return the identity that tokens are stamped with; it reads the tower unless the identity was given."""
        return self._identity or self._encoder_and_identity[1]

    @functools.cached_property
    def shape(self) -> tuple[int, int]:
        """Return the number of tokens of a frame, and their width; only the tower's config is read.

        Raises:
          MissingError: the folder does not exist, or lacks the config.
        """
        config = read_clip_vision_config(self._folder)
        return config.tokens, config.width

    def __call__(self, frames: UInt8[np.ndarray, "T H W 3"]) -> Float32[np.ndarray, "T i F"]:
        """Return the tokens of each frame.

        Raises:
          MissingError: the folder does not exist, or lacks parts.
          UserError: a folder of another model, or of another encoder than before.
        """
        return self._encoder_and_identity[0](frames)

    @functools.cached_property
    def _encoder_and_identity(self) -> tuple[FrameEncoder, str]:
        tower = load_clip_vision(self._folder, place=get_placement(self._offload))
        images = load_clip_image_processor(self._folder)
        parts = [to_json(tower.config), tower.digest, to_json(images)]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
        if self._identity not in ("", digest):
            raise UserError(
                f"{self._folder} holds the image encoder {digest}, {self._identity} was used before; put that one back"
            )
        return FrameEncoder(tower.config, tower.params, images, feature=FEATURE, batch=2), digest


def open_image_encoder(folder: str | os.PathLike, *, identity_file: Path) -> FrozenImageEncoder:
    """Open an image encoder and record its identity: later it must be the same, and is known without the weights.

    Raises:
      MissingError: the folder does not exist, or lacks parts.
      UserError: a folder of another model.
    """
    if identity_file.is_file():
        return FrozenImageEncoder(folder, identity=read_json(identity_file)["identity"])
    encoder = FrozenImageEncoder(folder)
    write_json(identity_file, {"identity": encoder.identity})
    return encoder
