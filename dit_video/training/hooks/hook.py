"""The interface of hooks: what happens in a training besides its steps."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dit_video.core.typing import AnyArray


class Hook:
    """Something that a training does besides its steps; methods that a subclass leaves out do nothing.

    All processes call a hook, in the order of the list of hooks, unless it is `first_process_only`.
    """

    first_process_only: ClassVar[bool] = False
    """True for a hook that only the first process calls, such as a log."""
    name: str = "hook"
    """Name of the metric `NAME_seconds`, the time that `call` takes."""

    def resume(self, step: int) -> None:
        """Prepare to start, or to continue after `step`: discard what was written of later steps."""

    def annotate(self, step: int) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which a step is started; steps are counted from 1."""
        return contextlib.nullcontext()

    def on_step(self, step: int, state: Any, metrics: Mapping[str, Any]) -> None:
        """Continue after a step was started, whose results need not be available. Keep no references to the state."""

    def is_due(self, step: int, *, is_last: bool) -> bool:
        """Return True if `call` is called after this step, for which the devices finish all steps first."""
        return False

    def call(self, step: int, state: Any) -> Mapping[str, float]:
        """Return metrics that are logged at this step. Keep no references to the state."""
        return {}

    def derive(self, values: Mapping[str, float]) -> Mapping[str, float]:
        """Return further metrics of an entry of the log."""
        return {}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write an entry of the log; steps increase."""

    def identify(self, batch: Any) -> Mapping[str, AnyArray]:
        """Return small arrays that identify a batch, for `on_skip`."""
        return {}

    def on_skip(self, step: int, metrics: Mapping[str, Any], batch_ids: Mapping[str, AnyArray]) -> None:
        """Note that a step was skipped, because its loss or gradient was not finite."""

    def before_save(self, step: int, state: Any) -> None:
        """Prepare for a checkpoint of this state, from which the training may continue later."""

    def on_save(self, step: int, digests: Mapping[str, int]) -> None:
        """Note that a checkpoint of this step is being written; `digests` holds each array's digest by its path."""

    def close(self) -> None:
        """End, after the last step or an error."""


@dataclass(frozen=True)
class StepCall(Hook):
    """A function that is called after every step, which the devices need not have finished."""

    function: Callable[[int, Any], None]
    """Function of the number of steps done and the state, to which it must not keep references."""

    def on_step(self, step: int, state: Any, metrics: Mapping[str, Any]) -> None:
        self.function(step, state)


@dataclass(frozen=True, kw_only=True)
class PeriodicCall(Hook):
    """A function that is called at an interval of steps, and after the last one."""

    every: int
    """Interval in steps."""
    function: Callable[[int, Any], Mapping[str, float]]
    """Function of the number of steps done and the state, to which it must not keep references. Its result is
    logged."""
    name: str = "hook"
    """Name of the metric `NAME_seconds`, the time that the function takes, such as "validate"."""

    def is_due(self, step: int, *, is_last: bool) -> bool:
        return step % self.every == 0 or is_last

    def call(self, step: int, state: Any) -> Mapping[str, float]:
        return self.function(step, state)
