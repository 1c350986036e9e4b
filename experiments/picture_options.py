"""Options for images and clips that a sampled clip keeps or follows."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_video.core.errors import UserError
from dit_video.sampling.request import Method
from dit_video.sampling.request_file import read_pictures


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """Files of images and clips, fitted to the size of the sampled clip; of a model that accepts them."""

    image: Path | None = None
    """First frame of the clip: an image, or a video whose first frame is used."""
    last_image: Path | None = None
    """Last frame of the clip."""
    video: Path | None = None
    """Clip that is kept where --mask is white."""
    mask: Path | None = None
    """Mask of --video, an image for all of its frames or a video: white is kept, black is generated. Mask files of VACE
    and diffusers are the other way round: invert them. With --task inpaint white is filled in, as in theirs."""
    control: Path | None = None
    """Clip that steers what is generated, such as poses, depth or edges."""
    reference_images: tuple[Path, ...] = ()
    """Images of subjects that the clip shows."""
    conditions: tuple[str, ...] = ()
    """Images or clips at some frames, each FILE@FRAME or FILE@FRAME@STRENGTH, such as middle.png@40@0.8."""
    strength: float | None = None
    """Diffusion time, in (0, 1], that --video is noised to and sampling starts at; with a task, its clip's."""
    method: Method = "auto"
    """Way to keep what is known: as the model was trained (trained), by replacement of latents (training_free), or the
    first where the model was trained for it (auto)."""
    resample: int = 1
    """Number of times that training-free sampling takes every part of the steps."""
    strengths: tuple[str, ...] = ()
    """Strengths of conditioning, each NAME=NUMBER or, with one number for each layer, NAME=NUMBER,NUMBER,…"""

    def read(self) -> dict[str, Any]:
        """Return the arguments of `Pipeline.generate`: decoded files, and strengths.

        Raises:
          MissingError: If a file does not exist.
          DecodeError: If a file is damaged.
          UserError: If there is a mask without a video, or if a text does not have its form.
        """
        strengths = dict(map(_parse_strength, self.strengths))
        options = {"strength": self.strength, "method": self.method, "resample": self.resample}
        return read_pictures(self.list_files(), Path()) | options | ({"strengths": strengths} if strengths else {})

    def list_files(self) -> dict[str, Any]:
        """Return the files of all pictures, by the names of a request's fields."""
        names = ("image", "last_image", "video", "mask", "control", "reference_images")
        conditions = [_parse_condition(text) for text in self.conditions]
        return {name: getattr(self, name) for name in names} | {"conditions": conditions}


def _parse_condition(text: str) -> dict[str, Any]:
    if (match := re.fullmatch(r"(.+?)@(-?\d+)(?:@(\d*\.?\d+))?", text)) is None:
        raise UserError(
            f"--conditions {text} is invalid: it must be FILE@FRAME or FILE@FRAME@STRENGTH. Use first.png@0"
        )
    file, frame, strength = match.groups()
    return {"file": file, "frame": int(frame), "strength": float(strength or 1)}


def _parse_strength(text: str) -> tuple[str, float | tuple[float, ...]]:
    name, _, numbers = text.partition("=")
    try:
        values = tuple(map(float, numbers.split(",")))
    except ValueError as error:
        raise UserError(f"--strengths {text} is invalid: it must be NAME=NUMBER. Use {name}=1.0") from error
    return name, values if len(values) > 1 else values[0]
