"""Profiler trace of a few steps, for XProf or TensorBoard."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from dit_video.core.errors import UserError
from dit_video.training.hooks.hook import Hook


@dataclass(frozen=True)
class TraceConfig:
    """Configuration of a profiler trace. Steps are counted from 1.

    Raises:
      UserError: If the range of steps is empty, or begins before step 1.
    """

    folder: Path
    """Folder that the trace is written to."""
    first: int
    """First step of the trace."""
    last: int
    """Last step of the trace."""

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.last:
            raise UserError(f"cannot trace steps {self.first} to {self.last}: use a range from 1 on that is not empty.")


class Tracer(Hook):
    """A profiler trace that starts before its first step and ends after its last, or at the end of the run.

    If it cannot be made or written, a warning says why, and the training goes on.
    """

    def __init__(self, config: TraceConfig) -> None:
        self._config, self._was_started, self._is_running = config, False, False

    @contextlib.contextmanager
    def annotate(self, step: int) -> Iterator[None]:
        """Annotate a step inside the context, and start the trace if it is the first."""
        profile = self._config
        if not profile.first <= step <= profile.last:
            yield
            return
        if not self._was_started:
            self._was_started = True
            self._is_running = self._attempt(lambda: jax.profiler.start_trace(str(profile.folder)))
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def on_step(self, step: int, state: Any, metrics: Mapping[str, Any]) -> None:
        """End the trace if this was its last step, once the step's result is available."""
        if self._is_running and step >= self._config.last:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """End the trace if it is running."""
        if self._is_running:
            self._is_running = False
            self._attempt(jax.profiler.stop_trace)

    def _attempt(self, call: Callable[[], Any]) -> bool:
        """Return whether a call of the profiler succeeds."""
        try:
            call()
        except (RuntimeError, OSError) as error:  # of another trace, or of the folder
            traced = f"steps {self._config.first} to {self._config.last}"
            warnings.warn(
                f"no trace of {traced} is written to {self._config.folder}: {error}. The training goes on.",
                stacklevel=3,
            )
            return False
        return True
