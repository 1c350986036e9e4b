"""Time limits for the processes of a run and for its steps."""

from dataclasses import dataclass

from dit_video.core.errors import check_at_least


@dataclass(frozen=True, kw_only=True)
class TimeoutConfig:
    """Configuration of how long other processes, and steps, are waited for, in seconds.

    Raises:
      UserError: If a time is too short.
    """

    startup: float = 300.0
    """Time until all processes have started."""
    max_silence: float = 60.0
    """Time without a heartbeat after which JAX takes a process for lost, and ends the others."""
    max_step: float = 1800.0
    """Time in which a training finishes no step, in no process, before it counts as hung and ends. Phases such as
    saving and sampling, in any process, do not count."""
    max_phase: float = 14400.0
    """Time in which such a phase makes no progress before it counts as hung and ends the run."""
    max_idle: float = 7200.0
    """Time in which a run of several processes makes no progress outside of trainings, such as before the first step,
    before it counts as hung and ends. Samples and evaluated clips count as progress; encoded clips do, too, and have to
    follow each other within `max_step`."""

    def __post_init__(self) -> None:
        check_at_least(1, startup=self.startup, max_silence=self.max_silence)
        check_at_least(1, max_step=self.max_step, max_phase=self.max_phase, max_idle=self.max_idle)

    @property
    def grace(self) -> float:
        """Time for the other processes to read why one ends, and to end by themselves before JAX ends them."""
        return min(10.0, self.max_silence / 4)
