"""Configuration of sampling, and values that replace a part of it."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict

import numpy as np

from dit_video.core.errors import UserError, check_at_least
from dit_video.diffusion import (
    AdaptiveProjectedGuidance,
    Euler,
    ExplicitTimes,
    Guidance,
    Process,
    RectifiedFlow,
    SampleTimes,
    SkipLayerGuidance,
    Solver,
    TimeSchedule,
    UniformTimes,
    ZeroStarGuidance,
    get_sampler,
    override_shift,
)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Configuration of sampling.

    Raises:
      UserError: If there is less than one step, guidance is invalid, or the shift is not positive.
    """

    steps: int = 32
    """Number of sampling steps."""
    guidance: float | tuple[float, float] | Guidance = 2.0
    """Classifier-free guidance; 1 is none. A pair holds the scales of two experts, the one for noisy times first."""
    solver: Solver = Euler()
    """Solver of the probability flow or of the reverse process."""
    time_schedule: TimeSchedule = UniformTimes()
    """Times of the steps."""
    shift: float | None = None
    """Shift of the times towards noise (see `RectifiedFlow`); None for the shift of training."""
    branch_evaluation: Literal["together", "apart"] = "together"
    """Evaluation of guidance branches: all at once, or one after the other, which takes less memory."""

    def __post_init__(self):
        check_at_least(1, steps=self.steps)
        _ = self.full_guidance  # Its constructor checks the values.
        if self.shift is not None:
            RectifiedFlow(shift=self.shift)

    def make_times(self, process: Process) -> SampleTimes:
        """Return the times of the steps.

        Raises:
          UserError: If the schedule does not fit the process, or the shift does not move its times.
        """
        schedule = self.time_schedule
        if self.shift is not None:
            schedule, process = override_shift(schedule, process, self.shift)
        return schedule(process, self.steps)

    def check_experts(self, count: int) -> None:
        """Check that guidance has a scale for each of `count` experts, or one for all.

        Raises:
          UserError: If it has two for a model with one.
        """
        scales = self.full_guidance.scales
        if len(scales) > count:
            raise UserError(f"guidance={scales} is invalid: this model has no second expert. Use one number.")

    @property
    def full_guidance(self) -> Guidance:
        """Return the guidance with all its options."""
        return self.guidance if isinstance(self.guidance, Guidance) else Guidance(scale=self.guidance)

    def override_guidance(
        self,
        *,
        scale: float | tuple[float, float] | None = None,
        interval: tuple[float, float] | None = None,
        rescale: float | None = None,
        projected: bool | None = None,
        zero_star: bool | None = None,
        skip_layers: tuple[int, ...] = (),
    ) -> Guidance:
        """Return its guidance with the passed options replaced.

        Raises:
          UserError: If `Guidance` refuses the values.
        """
        numbers = {"scale": scale, "interval": interval, "rescale": rescale}
        changes: dict[str, Any] = {name: value for name, value in numbers.items() if value is not None}
        if projected is not None:
            changes["projection"] = AdaptiveProjectedGuidance() if projected else None
        if zero_star is not None:
            changes["zero_star"] = ZeroStarGuidance() if zero_star else None
        if skip_layers:
            changes["skip_layers"] = SkipLayerGuidance(layers=skip_layers)
        return replace(self.full_guidance, **changes)


GuidanceScale = float | int | tuple[float, float] | Guidance
"""Scale of guidance, one for each of two experts, or guidance with all its options."""


class SamplingOverrides(TypedDict, total=False):
    """Arguments that replace values of a pipeline's own sampling; None keeps them."""

    steps: int | None
    guidance: GuidanceScale | None
    sampler: str | Solver | None
    shift: float | int | None
    times: Sequence[float | int] | None


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
      own: Sampling of the pipeline.
      process: Process of the pipeline, whose shift the times have otherwise.
      steps: Number of steps.
      guidance: Guidance, or its scale.
      sampler: A solver, or its name.
      shift: Shift of the times, as in `RectifiedFlow`.
      times: Falling times at which the steps start, in (0, 1]; the last step leads to 0. They are shifted by `shift`
        alone, not by the process.

    Raises:
      UserError: If the sampler is unknown, there is less than one step, the shift is not positive or does not move the
        times, the times do not fall or are outside (0, 1], or there are not as many steps as times.
    """
    changes: dict[str, Any] = {}
    if steps is not None:
        changes["steps"] = steps
    if guidance is not None:
        changes["guidance"] = _resolve_guidance(own, guidance)
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


def _resolve_guidance(own: Sampling, override: GuidanceScale) -> float | tuple[float, float] | Guidance:
    """Return the guidance that overrides a pipeline's own; numbers replace only the scale."""
    if isinstance(override, Guidance):
        return override
    scale = (float(override[0]), float(override[1])) if isinstance(override, tuple) else float(override)
    return own.override_guidance(scale=scale) if isinstance(own.guidance, Guidance) else scale
