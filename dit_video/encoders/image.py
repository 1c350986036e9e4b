"""The frozen CLIP whose tokens of an image some denoisers attend to: opening it reads its weights."""

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
from dit_video.features import FrameEncoder
from dit_video.weights import load_clip_images, load_clip_vision

IMAGE_ENCODER = "image_encoder.json"
"""in a run's folder, the identity of its image encoder"""


class ImageEncoder:
    """Image tokens of frames: the penultimate hidden states of a CLIP's vision tower, as Wan's image-to-video has them.

    It is opened at the first frame.

    Args:
      folder: of the tower, with the settings of its images in it or beside it; or of the pipeline that it is a part of.
      identity: of tower and settings: the folder must hold those; empty takes any.
    """

    def __init__(self, folder: str | os.PathLike, *, identity: str = ""):
        self._folder, self._identity = Path(folder), identity

    @property
    def identity(self) -> str:
        """What tokens are stamped with. The tower is read for it if it was not given."""
        return self._identity or self._opened[1]

    def __call__(self, frames: UInt8[np.ndarray, "T H W 3"]) -> Float32[np.ndarray, "T i F"]:
        """The tokens of each frame.

        Raises:
          MissingError: no such folder, or parts that it lacks.
          UserError: a folder of another model, or of another one than before.
        """
        return self._opened[0](frames)

    @functools.cached_property
    def _opened(self) -> tuple[FrameEncoder, str]:
        tower, images = load_clip_vision(self._folder), load_clip_images(self._folder)
        parts = [to_json(tower.config), tower.digest, to_json(images)]
        found = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
        if self._identity not in ("", found):
            raise UserError(
                f"{self._folder} holds the image encoder {found}, {self._identity} was used before; put that one back"
            )
        return FrameEncoder(tower.config, tower.params, images, part="before", batch=2), found


def open_image_encoder(folder: str | os.PathLike, *, kept: Path) -> ImageEncoder:
    """An encoder whose identity is kept in a file: from then on it is known without the weights, and must be the same.

    Raises:
      MissingError: no such folder, or parts that it lacks.
      UserError: a folder of another model.
    """
    if kept.is_file():
        return ImageEncoder(folder, identity=read_json(kept)["identity"])
    encoder = ImageEncoder(folder)
    write_json(kept, {"identity": encoder.identity})
    return encoder
