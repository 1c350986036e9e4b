"""How a sampled clip was made, as JSON values that its file holds."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from dit_video.core import config_json
from dit_video.generation import Sampling
from dit_video.generation.pictures import Condition
from dit_video.generation.plan import SamplingPlan
from dit_video.generation.request import Request
from dit_video.pipelines.config import PipelineConfig
from dit_video.video import Clip


def make_recipe(config: PipelineConfig, request: Request, plan: SamplingPlan, sampling: Sampling) -> dict[str, Any]:
    """Return the recipe of a clip.

    Pictures are named by the hashes of their pixels: the same pictures, values and model give the same clip.

    Args:
      config: config of the pipeline.
      request: the request, with its size.
      plan: its plan, which says how known pixels were kept.
      sampling: steps, solver and guidance.
    """
    values: dict[str, Any] = {
        "prompt": request.prompt,
        "negative": config.negative if request.negative is None else request.negative,
        "size": list(request.grid),
        "seed": request.seed,
        "strength": request.strength,
        "resample": plan.resample if plan.resample > 1 else None,
        "method": plan.method,
        "task": None if request.task is None else type(request.task).__name__,
        "strengths": {name: np.asarray(value, float).tolist() for name, value in request.strengths.items()},
        "conditioning": sorted(request.conditioning),
        "pictures": _describe_pictures(request.pictures),
        "noise": None if request.noise is None else _hash(np.asarray(request.noise)),
        "sampling": config_json.to_json(sampling),
        "model": config.provenance,
    }
    absent: tuple[Any, ...] = (None, "", {}, [])
    return {name: value for name, value in values.items() if value not in absent}


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
        return parts if picture.mask is None else parts | {"mask": _hash(picture.mask)}
    return _hash(picture.frames if isinstance(picture, Clip) else np.asarray(picture))


def _hash(array: np.ndarray) -> str:
    content = repr((array.dtype.str, array.shape)).encode() + np.ascontiguousarray(array).tobytes()
    return hashlib.blake2b(content, digest_size=8).hexdigest()
