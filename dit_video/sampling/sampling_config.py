"""Configuration of sampling."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64

from dit_video.core.errors import UserError, check_at_least, check_number, check_whole
from dit_video.diffusion import (
    TEXT,
    Euler,
    ExplicitTimes,
    Guidance,
    Process,
    RectifiedFlow,
    SampleTimes,
    Solver,
    TimeSchedule,
    UniformTimes,
    get_solver,
    override_shift,
)

GuidanceScale = float | tuple[float, float] | Mapping[str, float | tuple[float, float]] | Guidance
"""Scale of the prompt's guidance, a pair of scales for two experts (the one for noisy times first), scales of all
conditions by their names, or guidance with its options."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Configuration of sampling.

    Raises:
      UserError: If there is less than one step, guidance is invalid, or the shift is not positive.
    """

    steps: int = 32
    """Number of sampling steps."""
    guidance: Guidance = Guidance()
    """Guidance; a number, or a pair of numbers for two experts, is the prompt's scale."""
    solver: Solver = Euler()
    """Solver of the probability flow or of the reverse process."""
    time_schedule: TimeSchedule = UniformTimes()
    """Times of the steps."""
    shift: float | None = None
    """Shift of the times towards noise (see `RectifiedFlow`); None for the shift of training."""
    branch_evaluation: Literal["together", "apart"] = "together"
    """Evaluation of guidance branches: all at once, or one after the other, which takes less memory."""
    previous: Mapping[str, "Sampling"] | None = field(default=None, hash=False)
    """Sampling of previous steps by their names; None, or a step that is left out, keeps the step's own."""

    def __post_init__(self):
        check_whole(steps=self.steps)
        check_at_least(1, steps=self.steps)
        object.__setattr__(self, "steps", int(self.steps))
        object.__setattr__(self, "guidance", make_guidance(self.guidance))
        check_number(shift=self.shift)
        if self.shift is not None:
            RectifiedFlow(shift=self.shift)

    def change(
        self,
        process: Process,
        *,
        steps: int | None = None,
        guidance: GuidanceScale | None = None,
        solver: str | Solver | None = None,
        shift: float | None = None,
        times: Sequence[float] | np.ndarray | None = None,
    ) -> "Sampling":
        """Return this sampling with the given values replaced; None keeps a value.

        Args:
          process: Process of the model, whose shift the times have otherwise.
          steps: Number of steps.
          guidance: Guidance, or the prompt's scale or all scales, which leave its other options.
          solver: A solver, or its name in `dit_video.diffusion.SOLVERS`.
          shift: Shift of the times, as in `RectifiedFlow`.
          times: Falling times at which the steps start, in (0, 1]; the last step leads to 0. They are shifted by
            `shift` alone, not by the process.

        Raises:
          UserError: If the solver is unknown, there is less than one step, the shift is not positive or does not move
            the times, the times do not fall or are outside (0, 1], or there are not as many steps as times.
        """
        check_number(shift=shift)
        changes: dict[str, Any] = {}
        if steps is not None:
            changes["steps"] = steps
        if guidance is not None:
            changes["guidance"] = make_guidance(guidance, base=self.guidance)
        if solver is not None:
            changes["solver"] = _find_solver(solver)
        if times is not None:
            starts = _read_times(times, steps)
            if shift is not None:
                _, shifted = override_shift(UniformTimes(), process, shift)
                starts = shifted.shift_time(starts)
            schedule = ExplicitTimes(times=(*map(float, starts), 0.0))
            changes |= {"steps": len(starts), "time_schedule": schedule, "shift": None}
        elif shift is not None:
            override_shift(self.time_schedule, process, shift)
            changes["shift"] = float(shift)
        return replace(self, **changes)

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
        if self.guidance.expert_count > count:
            scales = dict(self.guidance.scales)
            raise UserError(f"guidance={scales} is invalid: this model has no second expert. Use one number for each.")


def make_guidance(value: GuidanceScale, *, base: Guidance = Guidance()) -> Guidance:
    """Return guidance of a user's value: numbers replace the prompt's scale in `base`, a mapping all its scales.

    Raises:
      UserError: If the value is neither guidance nor scales.
    """
    if isinstance(value, Guidance):
        return value
    return replace(base, scales=value if isinstance(value, Mapping) else {**base.scales, TEXT: value})


def check_is_sampling(value: object) -> None:
    """Check that a value is a `Sampling` or None.

    Raises:
      UserError: If it is another value, such as a mapping of its fields.
    """
    if value is not None and not isinstance(value, Sampling):
        raise UserError(f"sampling={value!r} is invalid: it must be a Sampling. Use steps=, guidance= … without it.")


def _find_solver(value: str | Solver) -> Solver:
    if isinstance(value, str):
        return get_solver(value)
    if not isinstance(value, Solver):
        raise UserError(f"solver={value!r} is invalid: it must be the name of one, or a Solver. Use 'euler'.")
    return value


def _read_times(times: Sequence[float] | np.ndarray, steps: int | None) -> Float64[np.ndarray, " S"]:
    """Return the times at which steps start.

    Raises:
      UserError: If they are no falling numbers in (0, 1], or not as many as the steps.
    """
    values = np.asarray(times)
    if values.ndim != 1 or values.dtype.kind not in "fiu":
        raise UserError(f"times={times!r} is invalid: it must be a list of numbers. Use [1, 0.75, 0.5].")
    is_falling = bool((np.diff(values) < 0).all())
    if not len(values) or not is_falling or not 0 < values[-1] <= values[0] <= 1:
        is_number_of_step = len(values) and values.max() > 1
        fix = "Use times of 1000 steps divided by 1000" if is_number_of_step else "Use times such as 1 0.75 0.5"
        raise UserError(f"times={(*values.tolist(),)} is invalid: steps start at times that fall, in (0, 1]. {fix}.")
    if steps is not None and steps != len(values):
        raise UserError(f"steps={steps} is invalid: times are of {len(values)} steps. Use one of the two.")
    return values.astype(np.float64)
