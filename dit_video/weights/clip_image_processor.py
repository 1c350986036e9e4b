"""CLIP's image preprocessing: the settings of `transformers`' `CLIPImageProcessor`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import read_json, write_json
from dit_video.models.features.clip import ClipImageProcessor

_FILE, _PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"
"""Files of an image processor alone, and of one that was saved with a tokenizer."""
_SUBFOLDERS = ("image_processor", "feature_extractor")
"""Names of its folder in pipelines."""
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
    "image_mean": list(ClipImageProcessor().mean),
    "image_std": list(ClipImageProcessor().std),
}


def load_clip_image_processor(folder: str | os.PathLike) -> ClipImageProcessor:
    """Read the image preprocessing from a folder, a pipeline's folder, or next to a pipeline's `image_encoder`.

    Raises:
      MissingError: there is no config of an image processor.
      UserError: the class of the image processor or one of its settings is not supported.
    """
    path = _find_file(Path(folder))
    values = read_json(path)
    if isinstance(values, dict) and path.name == _PROCESSOR_FILE:
        values = values.get("image_processor")
    if not isinstance(values, dict):
        raise UserError(f"{path} has no settings of an image processor. Copy or download it again")
    name = values.get("image_processor_type") or values.get("feature_extractor_type")
    if name not in _CLASSES:
        raise UserError(f"{path} has an image processor of class {name}. Supported classes are {', '.join(_CLASSES)}")
    settings = {key: default if values.get(key) is None else values[key] for key, default in _DEFAULTS.items()}
    factor = settings["rescale_factor"]
    if not settings["do_rescale"] or not isinstance(factor, float) or abs(factor * 255 - 1) > 1e-6:
        raise UserError(f"{path} has do_rescale={settings['do_rescale']}, rescale_factor={factor}. Supported is 1/255")
    if settings["do_resize"] and settings["resample"] != _BICUBIC:
        raise UserError(f"{path} has resample={settings['resample']}. Only {_BICUBIC} (bicubic) is supported")
    normalized = settings["do_normalize"]
    return ClipImageProcessor(
        resize=_parse_resize(path, settings["size"]) if settings["do_resize"] else None,
        crop=_parse_crop(path, settings["crop_size"]) if settings["do_center_crop"] else None,
        mean=_parse_rgb(path, settings["image_mean"]) if normalized else (0.0, 0.0, 0.0),
        std=_parse_rgb(path, settings["image_std"]) if normalized else (1.0, 1.0, 1.0),
    )


def save_clip_image_processor(folder: str | os.PathLike, images: ClipImageProcessor) -> None:
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


def _find_file(folder: Path) -> Path:
    places = [folder, *(folder / part for part in _SUBFOLDERS), *(folder.parent / part for part in _SUBFOLDERS)]
    paths = [place / file for place in places for file in (_FILE, _PROCESSOR_FILE)]
    processor_file = next((path for path in paths if path.is_file()), None)
    if processor_file is None:
        raise MissingError(
            f"{folder} has no {_FILE}, nor has {' or '.join(_SUBFOLDERS)} in or next to it. Copy it there"
        )
    return processor_file


def _parse_resize(path: Path, size: Any) -> int | tuple[int, int]:
    if isinstance(size, int):  # Older versions have the size of the shorter side.
        return size
    if isinstance(size, Mapping) and {key for key, value in size.items() if value is not None} == {"shortest_edge"}:
        return int(size["shortest_edge"])
    return _parse_height_width(path, "size", size)


def _parse_crop(path: Path, size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else _parse_height_width(path, "crop_size", size)


def _parse_height_width(path: Path, name: str, size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping) and {key for key, value in size.items() if value is not None} == {"height", "width"}:
        return int(size["height"]), int(size["width"])
    raise UserError(f"{path} has {name}={size}. Supported are height and width and, for size, shortest_edge")


def _parse_rgb(path: Path, values: Any) -> tuple[float, float, float]:
    if not isinstance(values, list) or len(values) != 3 or not all(isinstance(value, int | float) for value in values):
        raise UserError(
            f"{path} has the mean or standard deviation {values}. Use a number each for red, green and blue"
        )
    return float(values[0]), float(values[1]), float(values[2])
