"""Configuration of sampling."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from dit_video.core.errors import UserError, check_at_least
from dit_video.diffusion import (
    AdaptiveProjectedGuidance,
    Euler,
    Guidance,
    Process,
    RectifiedFlow,
    SampleTimes,
    SkipLayerGuidance,
    Solver,
    TimeSchedule,
    UniformTimes,
    ZeroStarGuidance,
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
    """Classifier-free guidance; 1 is none. A pair holds the scales of two experts, that of the noisy times first."""
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
