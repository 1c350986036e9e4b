"""Training loop: evaluate, log and save when they are due, then batch and step. The caller restores the state.

The loop waits for the device when it logs and saves. Otherwise it only keeps the device from falling more than two
steps behind, so that the device always has work while few batches are queued. `training.step_log` describes the entries
of the log and measures where the time goes; all else that happens besides the steps is a hook.

A step whose loss or gradient is not finite leaves the state unchanged (see `training.step`), is counted in the log as
`skipped`, and is logged with its batch. After `LoopConfig.max_consecutive_skips` such steps in a row the state from
before them is saved, and the run ends with an error.

After SIGINT or SIGTERM the current step is finished and saved, and the run ends with `AgreedStop`; a signal that
is repeated ends it immediately. Several processes all stop after the same step (see `training.preemption`).
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from dit_video.core import trees
from dit_video.core.errors import AgreedStop, UserError, check_at_least
from dit_video.training.checkpoint import Checkpoints
from dit_video.training.hooks.hook import Hook
from dit_video.training.hooks.logging import Progress
from dit_video.training.preemption import StopRequest, handle_signals
from dit_video.training.step import Metrics, StepFn, get_scalars
from dit_video.training.step_log import LoopTimer, NonFiniteLossError, StepLog, TooManySkipsError
from dit_video.training.time_recorder import TimeRecorder


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Length of a run and its intervals of logging and saving, in steps. The last step is always logged and saved.

    Raises:
      UserError: If `steps`, an interval or `max_consecutive_skips` is below 1.
    """

    steps: int
    log_every: int = 20
    save_every: int = 500
    max_consecutive_skips: int = 10
    """Number of consecutive steps with a non-finite loss or gradient after which the run ends."""
    preemption_grace: float = 300.0
    """Maximum number of seconds from a signal to the end of the training, which is saved. Preempted machines usually
    have about 30."""

    def __post_init__(self) -> None:
        check_at_least(1, steps=self.steps, log_every=self.log_every, save_every=self.save_every)
        check_at_least(1, max_consecutive_skips=self.max_consecutive_skips)


def run(
    step: Callable[[Any, Any], tuple[Any, dict[str, Array]]],
    state: Any,
    batches: Callable[[int], Iterator[Any]],
    *,
    config: LoopConfig,
    checkpoints: Checkpoints | None = None,
    hooks: Sequence[Hook] = (),
    title: str = "training",
    meta: Mapping[str, Any] | None = None,
    recorder: TimeRecorder | None = None,
) -> Any:
    """Train from `state.step` to `config.steps`, and return the last state.

    The docstring of this module describes the handling of signals.

    Args:
      step: Jitted function `(state, batch) -> (state, metrics)` that increments `state.step`; it may donate the state.
        Metrics include `loss`; see `Metrics` of `training.step`.
      state: State to start from.
      batches: Function from the number of steps done to an iterator over the batches from there on.
      config: Length of the run and its intervals.
      checkpoints: Checkpoints to save to; None to save nothing.
      hooks: Logs and all else that happens besides the steps.
      title: Title of the progress bar.
      meta: Metadata saved with each checkpoint.
      recorder: Recorder of the run's time, which `resume` has already given this training; None for a new one.

    Raises:
      UserError: If the run is beyond `config.steps` or its folder has a later checkpoint, if the data ended early, if
        the loss is not finite in a step that is not skipped, if `config.max_consecutive_skips` steps were skipped, or
        if the state is not finite (such a state is never saved).
      AgreedStop: After a signal.
      KeyboardInterrupt: If the signal is repeated.
    """
    start = int(state.step)
    hooks = [hook for hook in hooks if jax.process_index() == 0 or not hook.first_process_only]
    timer = LoopTimer(recorder)
    saver = _Saver(checkpoints, dict(meta or {}), start, hooks=hooks, timer=timer)
    saver.check_start(config.steps)
    log = StepLog(start, max_consecutive_skips=config.max_consecutive_skips, hooks=hooks, timer=timer)
    with contextlib.ExitStack() as stack:
        for hook in hooks:
            hook.resume(start)
            stack.callback(hook.close)
        if start == config.steps:
            return state
        step = _annotate_steps(timer.wrap_step(step), hooks, start)
        stop = stack.enter_context(handle_signals(start, grace=config.preemption_grace))
        timed_batches = timer.wrap_batches(stack.enter_context(_close_at_end(batches(start))))
        is_visible = jax.process_index() == 0
        progress = stack.enter_context(Progress(title, config.steps, start=start, visible=is_visible))
        stack.enter_context(timer.run_loop())
        try:
            for index in range(start, config.steps + 1):  # number of steps done
                is_last = index == config.steps
                if index > start:
                    results = _evaluate(hooks, index, state, timer, is_last=is_last)
                    if index % config.log_every == 0 or is_last or results:
                        log.write(results)
                        saver.check()
                    progress.update(index, log.entry.get("loss"), is_timed=timer.is_timed)
                    stop.record_step(index)
                    if index % config.save_every == 0:
                        saver.save(index, state, log)
                if is_last or stop.should_stop():
                    break
                batch = _read_batch(timed_batches, stop, index)
                if batch is None:
                    break
                state, metrics = step(state, batch)  # asynchronous
                log.add(batch, get_scalars(metrics))
                with timer.timed("hook"):
                    for hook in hooks:
                        hook.on_step(index + 1, state, metrics)
            saver.save(index, state, log)
        except NonFiniteLossError as error:
            raise saver.make_error(str(error)) from error
        except TooManySkipsError as error:
            raise saver.save_after_skips(error, log.step, state, log) from error
        saver.wait()
        timer.end(index)
        if stop.acknowledge():
            saved = "" if checkpoints is None else ", which is saved"
            raise AgreedStop(f"{title}, by {stop.signal_name} after step {index}{saved}")
    return state


def _evaluate(hooks: Sequence[Hook], index: int, state: Any, timer: LoopTimer, *, is_last: bool) -> dict[str, float]:
    """Return the metrics of all hooks that are due."""
    results: dict[str, float] = {}
    for hook in [hook for hook in hooks if hook.is_due(index, is_last=is_last)]:
        with timer.timed(hook.name, wait=True):
            results |= hook.call(index, state)
    return results


def _read_batch(batches: Iterator[Any], stop: StopRequest, index: int) -> Any:
    """Return the next batch, or None after a signal to stop, which may also have ended the data loader's processes.

    Raises:
      UserError: If the data ended before the training.
    """
    try:
        batch = next(batches)
    except Exception as error:
        if stop.should_stop():
            return None
        if isinstance(error, StopIteration):
            fix = f"Repeat them, or train for {index} steps."
            raise UserError(f"the data ended after step {index}. {fix}") from error
        raise
    return None if stop.should_stop() else batch


def _annotate_steps(step: StepFn, hooks: Sequence[Hook], steps_done: int) -> StepFn:
    """Return the step, which is started in the contexts of the hooks."""
    numbers = itertools.count(steps_done + 1)

    def annotated_step(state: Any, batch: Any) -> tuple[Any, Metrics]:
        number = next(numbers)
        with contextlib.ExitStack() as annotations:
            for hook in hooks:
                annotations.enter_context(hook.annotate(number))
            return step(state, batch)

    return annotated_step


class _Saver:
    """Writer of checkpoints that saves each step once, and only finite states."""

    def __init__(
        self,
        checkpoints: Checkpoints | None,
        meta: dict[str, Any],
        steps_done: int,
        *,
        hooks: Sequence[Hook],
        timer: LoopTimer,
    ) -> None:
        self._checkpoints = checkpoints
        self._meta = meta
        self._saved_step = steps_done
        self._hooks, self._timer = hooks, timer

    def check_start(self, steps: int) -> None:
        """Raise if the run cannot continue from its state, before anything is computed."""
        if self._saved_step > steps:
            raise UserError(f"steps={steps} is invalid: the run is at step {self._saved_step}. Use that step or more.")
        newest = None if self._checkpoints is None else self._checkpoints.latest()
        if newest is not None and newest > self._saved_step:
            raise UserError(
                f"the run starts at step {self._saved_step}, but its folder has a checkpoint of step {newest}. "
                "Restore that one, remove it, or use another folder."
            )

    def save(self, step: int, state: Any, log: StepLog) -> None:
        """Save the state of a step whose loss is finite, unless it is saved already; see `write`.

        Raises:
          NonFiniteLossError: If the loss of a step that was not skipped is not finite.
          TooManySkipsError: If too many consecutive steps were skipped.
        """
        if step != self._saved_step:
            log.fetch_metrics()
            self.write(step, state, log.entry)

    def write(self, step: int, state: Any, metrics: Mapping[str, float]) -> None:
        """Save a state, unless it is saved already.

        Args:
          step: Number of steps done.
          state: State after them.
          metrics: Newest entry of the log.

        Raises:
          UserError: If the state is not finite.
          ValueError: If the step function does not increment `state.step`.
        """
        if step == self._saved_step:
            return
        with self._timer.timed("save"):
            if int(state.step) != step:
                raise ValueError(f"state.step={int(state.step)} is wrong after {step} steps: each must add 1.")
            if (path := _find_nonfinite(state)) is not None:
                raise self.make_error(f"{path} is not finite after step {step}")
            if self._checkpoints is not None:
                for hook in self._hooks:
                    hook.before_save(step, state)
                digests = self._checkpoints.save(step, state, self._meta, metrics=metrics)
                for hook in self._hooks:
                    hook.on_save(step, digests)
            self._saved_step = step

    def save_after_skips(self, error: TooManySkipsError, step: int, state: Any, log: StepLog) -> UserError:
        """Save the state, which skipped steps have left as it was before the first of them, and return the error."""
        self.write(step, state, log.entry)
        self.wait()
        saved_note = "" if self._checkpoints is None else f" and is saved as step {step}"
        return UserError(
            f"{error}; the state is that from before them{saved_note}. Inspect the batches in skipped.jsonl. The "
            "same command resumes after them; a lower learning rate or stronger gradient clipping needs a new run."
        )

    def wait(self) -> None:
        """Wait until all saves are on disk."""
        if self._checkpoints is not None:
            with self._timer.timed("save"):
                self._checkpoints.wait()

    def check(self) -> None:
        """Raise the error of a save that has failed in the background; see `Checkpoints.check`."""
        if self._checkpoints is not None:
            self._checkpoints.check()

    def make_error(self, problem: str) -> UserError:
        """Return the error of a training that diverged."""
        newest = None if self._checkpoints is None else self._checkpoints.latest()
        saved = "nothing is saved yet" if newest is None else f"the last saved checkpoint is step {newest}"
        return UserError(f"{problem}; {saved}. Restart with a lower learning rate or stronger gradient clipping.")


@jax.jit
def _is_finite(array: Array) -> Bool[Array, ""]:
    # Some optimizers initialize scalars with infinity (the best loss so far), so only NaN counts there.
    return jnp.all(jnp.isfinite(array)) if array.ndim else ~jnp.isnan(array)


def _find_nonfinite(state: Any) -> str | None:
    """Return the path of the first array with NaN or infinity, or None."""
    arrays = {path: leaf for path, leaf in trees.flatten(state).items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
    # One array at a time, see `digests.compute_digests`.
    return next((path for path, array in arrays.items() if not _is_finite(array)), None)


@contextlib.contextmanager
def _close_at_end(iterator: Iterator[Any]) -> Iterator[Iterator[Any]]:
    """Close a generator, or a data loader's iterator with its processes, at the end of the run."""
    try:
        yield iterator
    finally:
        if hasattr(iterator, "close"):
            iterator.close()
