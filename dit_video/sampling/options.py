"""Arguments of a pipeline's methods."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Float32

from dit_video.core.errors import UserError
from dit_video.diffusion import ExplicitTimes, Guidance, Process, Solver, UniformTimes, get_sampler, override_shift
from dit_video.sampling import Sampling
from dit_video.sampling.pictures import Condition, Image
from dit_video.sampling.request import GenerationTask, Mask, Method, Request
from dit_video.video import Clip

GuidanceScale = float | int | tuple[float, float] | Guidance
"""Scale of guidance, one for each of two experts, or guidance with all its options."""


class SamplingOverrides(TypedDict, total=False):
    """Arguments that replace values of a pipeline's own sampling; None keeps them."""

    steps: int | None
    guidance: GuidanceScale | None
    sampler: str | Solver | None
    shift: float | int | None
    times: Sequence[float | int] | None


class GenerateOptions(SamplingOverrides, total=False):
    """Arguments of `Pipeline.generate` besides the prompt and the kind of output."""

    size: tuple[int, int, int] | None
    negative: str | None
    seed: int
    noise: Float32[np.ndarray, "t h w c"] | None
    image: Image | None
    last_image: Image | None
    conditioning: Mapping[str, Any] | None
    strengths: Mapping[str, float | int | Sequence[float | int]] | None
    task: GenerationTask | None
    video: Clip | None
    mask: Mask | None
    control: Clip | None
    reference_images: Sequence[Image]
    conditions: Sequence[Condition]
    strength: float | None
    method: Method
    resample: int


def split_options(prompt: str | int, options: Mapping[str, Any]) -> tuple[Request, SamplingOverrides]:
    """Return the request that arguments of `Pipeline.generate` describe, and what they override of its sampling.

    Raises:
      TypeError: an argument that does not exist.
    """
    if unknown := sorted(options.keys() - GenerateOptions.__annotations__.keys()):
        raise TypeError(f"generate() got an unexpected keyword argument {unknown[0]!r}")
    overrides: Any = {name: value for name, value in options.items() if name in SamplingOverrides.__annotations__}
    fields: Any = {name: value for name, value in options.items() if name not in overrides}
    for name in ("conditioning", "strengths"):
        fields[name] = fields.get(name) or {}
    return Request(prompt=str(prompt), **fields), overrides


def override_sampling(
    own: Sampling,
    process: Process,
    *,
    steps: int | None = None,
    guidance: GuidanceScale | None = None,
    sampler: str | Solver | None = None,
    shift: float | int | None = None,
    times: Sequence[float | int] | None = None,
) -> Sampling:
    """Return a pipeline's own sampling with the given values replaced.

    Args:
      own: sampling of the pipeline.
      process: process of the pipeline, whose shift the times have otherwise.
      steps: number of steps.
      guidance: guidance, or its scale.
      sampler: a solver, or its name.
      shift: shift of the times, as in `RectifiedFlow`.
      times: falling times at which the steps start, in (0, 1]; the last step leads to 0. They are shifted by `shift`
        alone, not by the process.

    Raises:
      UserError: an unknown sampler, less than one step, a shift that is not positive or that does not move the times,
        times that do not fall or are outside (0, 1], or another number of steps than of times.
    """
    changes: dict[str, Any] = {}
    if steps is not None:
        changes["steps"] = steps
    if guidance is not None:
        changes["guidance"] = resolve_guidance(own, guidance)
    if sampler is not None:
        changes["solver"] = get_sampler(sampler) if isinstance(sampler, str) else sampler
    if times is not None:
        _check_times(times, steps)
        changes["steps"] = len(times)
        starts: np.ndarray = np.asarray(times, np.float64)
        if shift is not None:
            _, shifted = override_shift(UniformTimes(), process, shift)
            starts = shifted.shift_time(starts)
        changes |= {"time_schedule": ExplicitTimes(times=(*map(float, starts), 0.0)), "shift": None}
    elif shift is not None:
        override_shift(own.time_schedule, process, shift)
        changes["shift"] = float(shift)
    return replace(own, **changes)


def _check_times(times: Sequence[float | int], steps: int | None) -> None:
    is_falling = all(time > next_time for time, next_time in itertools.pairwise(times))
    if not times or not is_falling or not 0 < times[-1] <= times[0] <= 1:
        fix = "Use times of 1000 steps divided by 1000" if times and max(times) > 1 else "Use times such as 1 0.75 0.5"
        raise UserError(f"times={tuple(times)} is invalid: steps start at times that fall, in (0, 1]. {fix}.")
    if steps is not None and steps != len(times):
        raise UserError(f"steps={steps} is invalid: times are of {len(times)} steps. Use one of the two.")


def resolve_guidance(own: Sampling, override: GuidanceScale) -> float | tuple[float, float] | Guidance:
    """Return the guidance that overrides a pipeline's own, of which numbers replace only the scale."""
    if isinstance(override, Guidance):
        return override
    scale = (float(override[0]), float(override[1])) if isinstance(override, tuple) else float(override)
    return own.override_guidance(scale=scale) if isinstance(own.guidance, Guidance) else scale
