"""Learning rate schedules: a linear warmup, then the schedule's own course."""

import abc
from dataclasses import dataclass

import optax

from dit_video.core.errors import UserError, check_at_least


@dataclass(frozen=True, kw_only=True)
class Schedule(abc.ABC):
    """A course of the learning rate over a training. One of another package is a registered subclass.

    Raises:
      UserError: If the warmup is negative.
    """

    warmup: int = 100
    """Number of steps of linear warmup."""

    def __post_init__(self):
        check_at_least(0, warmup=self.warmup)

    def make(self, peak: float, *, steps: int) -> optax.Schedule:
        """Return the learning rate after each number of updates of a training of `steps` steps.

        Raises:
          UserError: If the training is not longer than its warmup.
        """
        if steps <= self.warmup:
            raise UserError(f"warmup={self.warmup} is invalid: it must be below steps={steps}. Use a shorter warmup.")
        warmup = optax.linear_schedule(peak / max(1, self.warmup), peak, max(1, self.warmup))
        return optax.join_schedules([warmup, self.make_main(peak, steps=steps)], [self.warmup])

    @abc.abstractmethod
    def make_main(self, peak: float, *, steps: int) -> optax.Schedule:
        """Return the learning rate after the warmup, counted from its end; `steps` counts from the start."""


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The peak after the warmup."""

    def make_main(self, peak: float, *, steps: int) -> optax.Schedule:
        return optax.constant_schedule(peak)


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine from the peak to zero (arXiv 1608.03983)."""

    def make_main(self, peak: float, *, steps: int) -> optax.Schedule:
        return optax.cosine_decay_schedule(peak, steps - self.warmup)


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(Schedule):
    """The peak, then a linear fall to zero (arXiv 2404.06395).

    Raises:
      UserError: If the share of the fall is not in (0, 1].
    """

    decay: float = 0.2
    """Share of the training's steps in which it falls, the last ones."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.decay <= 1:
            raise UserError(f"decay={self.decay} is invalid: it must lie in (0, 1]. Use 0.2.")

    def make_main(self, peak: float, *, steps: int) -> optax.Schedule:
        length = steps - self.warmup
        cooldown = max(1, min(int(self.decay * steps), length))
        return optax.linear_schedule(peak, 0.0, cooldown, transition_begin=length - cooldown)
