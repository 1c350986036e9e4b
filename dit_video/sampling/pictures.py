"""Images, videos and masks as a notebook's user has them, converted where they enter.

Arrays are of NumPy or JAX: uint8, or floats from 0 to 1. A list of images is a video. A mask is True where pixels are
generated; in a file or a PIL image, white is True. What could be meant in two ways is refused.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image as PilImage

from dit_video.core.errors import UserError
from dit_video.video import Clip, decode

Image = Clip | PilImage.Image | np.ndarray | jax.Array | Path | str
"""An image: a clip of one frame, a PIL image, pixels `[H W 3]` or `[H W]` (gray), or a file's first frame."""
Video = Clip | np.ndarray | jax.Array | Sequence[Image] | Path | str
"""A video: a clip, frames `[T H W 3]`, a list of images of one size, or a file."""
Mask = Bool[np.ndarray, "T H W"] | Bool[np.ndarray, "H W"] | Bool[np.ndarray, " T"]
"""Mask of a clip's pixels, of those of all its frames, or of whole frames; True where they are generated."""
MaskImage = np.ndarray | jax.Array | PilImage.Image | Path | str
"""A mask: booleans as in `Mask`, or a picture that is white where pixels are generated."""

_ARRAY_FPS = 1.0
"""Frame rate of clips that are made of arrays and lists, which say none: a task's result has that of its clip."""


def to_image(name: str, value: Image) -> Clip:
    """Return an image as a clip of one frame; `name` begins the errors.

    Raises:
      MissingError: If the file does not exist.
      UserError: If the value is no image, or its pixels could be meant in two ways.
    """
    if isinstance(value, Clip):
        if len(value.frames) != 1:
            rule = f"a clip of {len(value.frames)} frames is no image"
            raise UserError(f"{name} is invalid: {rule}. Use Clip(clip.frames[:1], clip.fps)")
        return value
    if isinstance(value, str | Path):
        return decode(value, frames=1)
    pixels = _read_pil(name, value) if isinstance(value, PilImage.Image) else _to_uint8(name, value)
    if pixels.ndim == 2 and pixels.shape[-1] > 4:  # a row of pixels, perhaps, if it is less wide
        pixels = np.repeat(pixels[..., None], 3, axis=-1)
    if pixels.ndim != 3:
        fixes = {2: "np.repeat(pixels[..., None], 3, axis=-1)", 4: "pixels[0], one frame"}
        fix = fixes.get(pixels.ndim, "pixels [H W 3]")
        raise UserError(f"{name} of shape {list(pixels.shape)} is invalid: an image is [H W 3]. Use {fix}")
    return Clip(_select_colours(name, pixels)[None], _ARRAY_FPS)


def to_clip(name: str, value: Video) -> Clip:
    """Return a video as a clip; `name` begins the errors.

    Raises:
      MissingError: If the file does not exist.
      UserError: If the value is no video, or its pixels could be meant in two ways.
    """
    if isinstance(value, Clip):
        return value
    if isinstance(value, str | Path):
        return decode(value)
    if isinstance(value, list | tuple) and value:
        images = [to_image(name, each).frames for each in value]
        if len(sizes := {each.shape for each in images}) > 1:
            shown = ", ".join(f"{height}x{width}" for _, height, width, _ in sorted(sizes))
            raise UserError(f"{name} is invalid: its frames have the sizes {shown}. Use frames of one size")
        return Clip(np.concatenate(images), _ARRAY_FPS)
    if isinstance(value, PilImage.Image):
        raise UserError(f"{name} is invalid: an image is no video. Use [image], a list of frames")
    frames = _to_uint8(name, value)
    if frames.ndim != 4:
        shape = list(frames.shape)
        if frames.ndim == 3:
            fix = f"{name}[None]" if shape[-1] in (3, 4) else f"np.repeat({name}[..., None], 3, axis=-1)"
        else:
            fix = f"{name}[0]" if frames.ndim == 5 else "an array of frames"
        raise UserError(f"{name} of shape {shape} is invalid: a video is [T H W 3]. Use {fix}")
    return Clip(_select_colours(name, frames), _ARRAY_FPS)


def to_image_or_clip(name: str, value: Image | Video) -> Clip:
    """Return an image or a video as a clip; a file has all its frames."""
    if isinstance(value, PilImage.Image) or (isinstance(value, np.ndarray | jax.Array) and value.ndim < 4):
        return to_image(name, value)
    return to_clip(name, value)


def to_mask(name: str, value: MaskImage) -> Mask:
    """Return a mask, True where pixels are generated; `name` begins the errors.

    Raises:
      MissingError: If the file does not exist.
      UserError: If an array is not boolean, or not of one of the shapes of `Mask`; if a picture has values up to 127 at
        most, such as labels, or a PIL image is transparent.
    """
    if isinstance(value, str | Path | PilImage.Image):
        pixels = _read_pil(name, value)[None] if isinstance(value, PilImage.Image) else decode(value).frames
        brightness = pixels.mean(axis=-1)
        if 0 < brightness.max() < 127.5:
            rule = f"white, 255, is generated, and its brightest pixel is {brightness.max():.3g}"
            raise UserError(f"{name} is invalid: {rule}. Use the array pixels == label, or pixels > 0")
        return brightness[0] > 127.5 if len(brightness) == 1 else brightness > 127.5
    mask = np.asarray(value)
    if mask.dtype != np.bool_ or not 1 <= mask.ndim <= 3:
        rule = "it must be boolean, [T H W], [H W] or [T], True where pixels are generated"
        fix = f"{name}[..., 0]" if mask.ndim else "an array or a picture"
        if mask.ndim and mask.dtype != np.bool_:
            fix = f"{name} > 127 if white is 255, {name} > 0.5 if it is 1"
        raise UserError(f"{name} of {mask.dtype} {list(mask.shape)} is invalid: {rule}. Use {fix}")
    return mask


def _read_pil(name: str, image: PilImage.Image) -> np.ndarray:
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        rule = "the value of white is not known"
        raise UserError(f"{name} of mode {image.mode} is invalid: {rule}. Use np.asarray(image) / white, such as 65535")
    if "A" in image.mode or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA"))
        return _drop_alpha(name, rgba)
    return np.asarray(image.convert("RGB"))


def _to_uint8(name: str, value: Any) -> UInt8[np.ndarray, "..."]:
    """Return the values of an array, of any shape, as uint8.

    Raises:
      UserError: If the value is no array, or its values are neither uint8 nor floats from 0 to 1.
    """
    if isinstance(value, list | tuple | dict) or not hasattr(value, "__array__"):
        rule = f"a {type(value).__name__} is no picture"
        raise UserError(f"{name} is invalid: {rule}. Use a clip, an array, a PIL image or the name of a file")
    pixels = np.asarray(value)
    if pixels.dtype == np.uint8 or 0 in pixels.shape:
        return pixels.astype(np.uint8)
    is_float = jnp.issubdtype(pixels.dtype, jnp.floating)  # bfloat16, too
    if not is_float and pixels.dtype.kind not in "bui":
        raise UserError(f"{name} of {pixels.dtype} is invalid: pixels are numbers. Use uint8, or floats from 0 to 1")
    low, high = float(pixels.min()), float(pixels.max())
    if is_float and low >= 0 and high <= 1:
        return np.rint(pixels.astype(np.float32) * 255).astype(np.uint8)
    rule = f"pixels are uint8, or floats from 0 to 1, these from {low:.3g} to {high:.3g}"
    raise UserError(f"{name} of {pixels.dtype} {list(pixels.shape)} is invalid: {rule}. Use {_scale(low, high)}")


def _scale(low: float, high: float) -> str:
    """Return the expression that brings pixels to values from 0 to 1, with the condition for it if there are several.

    Args:
      low: The lowest value of the pixels.
      high: The highest value.
    """
    if not np.isfinite([low, high]).all():
        return "finite values"
    if low < 0:
        if low < -1 or high > 1:
            return "np.clip((pixels - black) / (white - black), 0, 1), with the values of black and white"
        return "(pixels + 1) / 2 if black is -1, np.clip(pixels, 0, 1) if it is 0"
    if high <= 1:
        return "pixels.astype(float) if white is 1"
    if high < 2:
        return "np.clip(pixels, 0, 1) if white is 1, pixels / 255 if it is 255"
    return "pixels / 255 if white is 255" if high <= 255 else "pixels / white, such as 65535"


def _select_colours(name: str, pixels: UInt8[np.ndarray, "..."]) -> UInt8[np.ndarray, "*T H W 3"]:
    """Return pixels of an array whose last axis is RGB, or RGBA without transparency.

    Raises:
      UserError: If the array has other channels, or parts are transparent.
    """
    shape = list(pixels.shape)
    if shape[-1] not in (3, 4) or 0 in shape:
        rule, fix = "the last axis is that of the colours, RGB", "pixels [H W 3]"
        axes = (-1, -3, 0) if len(shape) > 2 else (-1,)
        if (axis := next((axis for axis in axes if shape[axis] in (1, 3, 4)), None)) is not None:
            fix = "pixels" if axis == -1 else f"np.moveaxis(pixels, {axis}, -1)"
            fix = f"np.repeat({fix}, 3, axis=-1)" if shape[axis] == 1 else fix
        raise UserError(f"{name} of shape {shape} is invalid: {rule}. Use {fix}")
    return _drop_alpha(name, pixels) if shape[-1] == 4 else pixels


def _drop_alpha(name: str, pixels: UInt8[np.ndarray, "*T H W 4"]) -> UInt8[np.ndarray, "*T H W 3"]:
    if (pixels[..., 3] < 255).any():
        raise UserError(f"{name} is invalid: parts of it are transparent. Use image.convert('RGB'), or pixels[..., :3]")
    return np.ascontiguousarray(pixels[..., :3])
