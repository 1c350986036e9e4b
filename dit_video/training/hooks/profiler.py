"""A trace of a few steps, for XProf or TensorBoard."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from dit_video.core.errors import UserError


@dataclass(frozen=True)
class Profile:
    """Which steps are traced, counted from 1, and where the trace goes.

    Raises:
      UserError: steps that do not follow each other, or that there are none before.
    """

    folder: Path
    first: int
    last: int

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.last:
            raise UserError(
                f"steps {self.first} to {self.last} can't be traced; name the first and the last, from 1 on"
            )


class Tracer:
    """Starts the trace before the first of the steps and ends it after the last, or when the run ends."""

    def __init__(self, profile: Profile | None) -> None:
        self._profile, self._running = profile, False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the start of a step, by its number."""
        profile = self._profile
        if profile is None or not profile.first <= number <= profile.last:
            yield
            return
        if not self._running:
            jax.profiler.start_trace(str(profile.folder))
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def after(self, number: int, result: Any) -> None:
        """End the trace where this step was its last, when its result is there."""
        if self._running and self._profile is not None and number >= self._profile.last:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """End a trace that was begun."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
