"""How frames become images for CLIP: the settings of `transformers`' `CLIPImageProcessor`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import read_json, write_json
from dit_video.features.clip import ClipImages

_FILE, _WITH_TOKENIZER = "preprocessor_config.json", "processor_config.json"
"""of an image processor alone, and of one that was saved with a tokenizer"""
_PARTS = ("image_processor", "feature_extractor")
"""what pipelines call its folder"""
_CLASSES = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")
_BICUBIC = 3
_DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": _BICUBIC,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(ClipImages().mean),
    "image_std": list(ClipImages().std),
}


def load_clip_images(folder: str | os.PathLike) -> ClipImages:
    """The settings in a folder, in a pipeline's folder, or beside a pipeline's `image_encoder`.

    Raises:
      MissingError: none there.
      UserError: another class of image processor, or a setting that isn't known.
    """
    path = _find(Path(folder))
    values = read_json(path)
    if isinstance(values, dict) and path.name == _WITH_TOKENIZER:
        values = values.get("image_processor")
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no settings of an image processor; copy or download it again")
    name = values.get("image_processor_type") or values.get("feature_extractor_type")
    if name not in _CLASSES:
        raise UserError(f"{path} is of the class {name}; those known here are {', '.join(_CLASSES)}")
    given = {key: default if values.get(key) is None else values[key] for key, default in _DEFAULTS.items()}
    factor = given["rescale_factor"]
    if not given["do_rescale"] or not isinstance(factor, float) or abs(factor * 255 - 1) > 1e-6:
        raise UserError(f"{path} has do_rescale {given['do_rescale']}, rescale_factor {factor}; only 1/255 is known")
    if given["do_resize"] and given["resample"] != _BICUBIC:
        raise UserError(f"{path} has resample {given['resample']}; only {_BICUBIC} (bicubic) is known")
    colours = given["do_normalize"]
    return ClipImages(
        resize=_resize(path, given["size"]) if given["do_resize"] else None,
        crop=_crop(path, given["crop_size"]) if given["do_center_crop"] else None,
        mean=_three(path, given["image_mean"]) if colours else (0.0, 0.0, 0.0),
        std=_three(path, given["image_std"]) if colours else (1.0, 1.0, 1.0),
    )


def save_clip_images(folder: str | os.PathLike, images: ClipImages) -> None:
    """Write `preprocessor_config.json`; the inverse of `load_clip_images`."""
    values: dict[str, Any] = {
        "image_processor_type": _CLASSES[0],
        **_DEFAULTS,
        "do_resize": images.resize is not None,
        "do_center_crop": images.crop is not None,
        "image_mean": list(images.mean),
        "image_std": list(images.std),
    }
    if isinstance(images.resize, tuple):
        values["size"] = dict(zip(("height", "width"), images.resize, strict=True))
    elif images.resize is not None:
        values["size"] = {"shortest_edge": images.resize}
    if images.crop is not None:
        values["crop_size"] = dict(zip(("height", "width"), images.crop, strict=True))
    write_json(Path(folder) / _FILE, values)


def _find(folder: Path) -> Path:
    places = [folder, *(folder / part for part in _PARTS), *(folder.parent / part for part in _PARTS)]
    paths = [place / file for place in places for file in (_FILE, _WITH_TOKENIZER)]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise MissingError(f"{folder} has no {_FILE}, nor has {' or '.join(_PARTS)} in it or beside it; copy it there")
    return found


def _resize(path: Path, size: Any) -> int | tuple[int, int]:
    if isinstance(size, int):  # of older versions: the shorter side
        return size
    if isinstance(size, Mapping) and {key for key, value in size.items() if value is not None} == {"shortest_edge"}:
        return int(size["shortest_edge"])
    return _sides(path, "size", size)


def _crop(path: Path, size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else _sides(path, "crop_size", size)


def _sides(path: Path, name: str, size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping) and {key for key, value in size.items() if value is not None} == {"height", "width"}:
        return int(size["height"]), int(size["width"])
    raise UserError(f"{path} has {name} {size}; a height and a width are known, or the shortest_edge of a size")


def _three(path: Path, values: Any) -> tuple[float, float, float]:
    if not isinstance(values, list) or len(values) != 3 or not all(isinstance(value, int | float) for value in values):
        raise UserError(f"{path} has a mean or a deviation of {values}; give a number for red, green and blue each")
    return float(values[0]), float(values[1]), float(values[2])
