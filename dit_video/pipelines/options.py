"""Arguments of a pipeline's methods."""

from collections.abc import Mapping
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Float32

from dit_video.diffusion import Guidance, Solver
from dit_video.generation import Sampling
from dit_video.generation.request import GenerationTask, Image

GuidanceScale = float | int | tuple[float, float] | Guidance
"""Scale of guidance, one for each of two experts, or guidance with all its options."""


class SamplingOverrides(TypedDict, total=False):
    """Arguments that replace values of a pipeline's own sampling; None keeps them."""

    steps: int | None
    guidance: GuidanceScale | None
    sampler: str | Solver | None


class GenerateOptions(SamplingOverrides, total=False):
    """Arguments of `Pipeline.generate` besides the prompt and the kind of output."""

    size: tuple[int, int, int] | None
    negative: str
    seed: int
    noise: Float32[np.ndarray, "t h w c"] | None
    image: Image | None
    last_image: Image | None
    conditioning: Mapping[str, Any] | None
    strengths: Mapping[str, float] | None
    task: GenerationTask | None


def resolve_guidance(own: Sampling, override: GuidanceScale) -> float | tuple[float, float] | Guidance:
    """Return the guidance that overrides a pipeline's own, of which numbers replace only the scale."""
    if isinstance(override, Guidance):
        return override
    scale = (float(override[0]), float(override[1])) if isinstance(override, tuple) else float(override)
    return own.override_guidance(scale=scale) if isinstance(own.guidance, Guidance) else scale
