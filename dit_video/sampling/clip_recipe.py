"""Recipes of sampled clips: JSON values that say how they were made, which their files hold."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from dit_video.core import config_json
from dit_video.sampling import Sampling
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.plan import SamplingPlan
from dit_video.sampling.request import Condition, Request
from dit_video.video import Clip

_MAX_SHOWN = 8
"""Most numbers of a value that are not given by their hash."""


def make_recipe(config: PipelineConfig, request: Request, plan: SamplingPlan, sampling: Sampling) -> dict[str, Any]:
    """Return the recipe of a clip.

    Pictures are named by the hashes of their pixels: the same pictures, values and model give the same clip.

    Args:
      config: Config of the pipeline.
      request: The request, with its size.
      plan: Its plan, which says how known pixels were kept.
      sampling: Steps, solver and guidance.
    """
    known = dataclasses.replace(request, negative=config.negative if request.negative is None else request.negative)
    made = {
        "resample": plan.resample if plan.resample > 1 else None,
        "method": plan.method,
        "sampling": describe_config(sampling),
        "model": config.provenance,
    }
    return _drop_absent(describe_request(known) | made)


def describe_request(request: Request) -> dict[str, Any]:
    """Return all that a request asks for as JSON values, with hashes of pixels in the place of pictures."""
    defaults = Request("")
    return _drop_absent(
        {
            "prompt": str(request.prompt),
            "expanded_from": getattr(request.prompt, "original", None),
            "negative": request.negative,
            "size": None if request.size is None else list(request.size),
            "seed": request.seed,
            "strength": request.strength,
            "resample": None if request.resample == defaults.resample else request.resample,
            "method": None if request.method == defaults.method else request.method,
            "conditioner": None if request.conditioner is None else describe_config(request.conditioner),
            "strengths": {name: np.asarray(value, float).tolist() for name, value in request.strengths.items()},
            "conditioning": {name: _describe_value(value) for name, value in request.conditioning.items()},
            "pictures": _describe_pictures(request.pictures),
            "noise": None if request.noise is None else hash_pixels(np.asarray(request.noise)),
        }
    )


def _drop_absent(values: Mapping[str, Any]) -> dict[str, Any]:
    absent: tuple[Any, ...] = (None, "", {}, [])
    return {name: value for name, value in values.items() if value not in absent}


def describe_config(config: Any) -> Any:
    """Return a config as JSON values, or as text if it has a class that no file can name."""
    try:
        return config_json.to_json(config)
    except TypeError:
        return repr(config) if dataclasses.is_dataclass(config) else type(config).__qualname__


def _describe_value(value: Any) -> Any:
    """Return a value of conditioning: a text, or a few numbers, or a hash."""
    if isinstance(value, Mapping):
        return {str(name): _describe_value(item) for name, item in value.items()}
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        return str(value)
    return array.tolist() if array.size <= _MAX_SHOWN else hash_pixels(array)


def hash_pixels(array: np.ndarray) -> str:
    """Return a hash of an array's type, shape and values."""
    content = repr((array.dtype.str, array.shape)).encode() + np.ascontiguousarray(array).tobytes()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _describe_pictures(pictures: Mapping[str, Any]) -> dict[str, Any]:
    described: dict[str, Any] = {}
    for name, value in pictures.items():
        values = value if isinstance(value, list | tuple) else [value]
        parts = [_describe_picture(each) for each in values]
        described[name] = parts if isinstance(value, list | tuple) else parts[0]
    return described


def _describe_picture(picture: Any) -> Any:
    if isinstance(picture, Condition):
        parts: dict[str, Any] = {"frame": picture.frame, "strength": picture.strength}
        parts["content"] = _describe_picture(picture.content)
        return parts if picture.generated is None else parts | {"generated": hash_pixels(picture.generated)}
    return hash_pixels(picture.frames if isinstance(picture, Clip) else picture)
