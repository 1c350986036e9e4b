"""Training loop: batch, step, log, save, in this order. The caller restores the state.

The loop waits for the device when it logs and saves. Otherwise it only keeps the device from falling more than two
steps behind, so that the device always has work while few batches are queued.

An entry of the log is the mean of the metrics over the steps since the previous entry (or since the start of this
process), with `step_seconds` and `steps_per_second` (excluding the first step, saving and hooks); `data_wait`, the
share of the time spent waiting for a batch while the device was idle (an upper bound: if the device became idle during
a wait, the whole wait counts); the device's memory, if it reports that; and once `first_step_seconds`, most of which is
compilation. Results of periodic calls are logged at their step, and hooks add metrics to each entry.

Where the time went is logged, too. `interval_seconds` is the whole time since the previous entry, or since the start of
this process's loop; its parts besides steps are `first_batch_seconds` (once), `compile_seconds` (of the first step, and
of each with new shapes; a part of the steps' time), `save_seconds`, and for hooks `NAME_seconds`, such as
`validate_seconds`. Saving and hooks that follow an entry are in the next one. `unix_seconds` is the time of day of
the entry; where an entry comes later after the previous one than its interval lasts, the run was not running, or steps
were repeated. A `TimeRecorder` accounts for the time of the whole run, over all of its starts.

A step whose loss or gradient is not finite leaves the state unchanged (see `training.step`), is counted in the log as
`skipped`, and is logged with its batch. After `LoopConfig.max_consecutive_skips` consecutive ones the run ends and
saves the state from before them.

After SIGINT or SIGTERM the current step is finished and saved, and the run ends with `GracefulStop`; a second signal
ends it immediately. Several processes all stop after the same step (see `training.preemption`).
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from dit_video.core import trees as trees
from dit_video.core.errors import GracefulStop, UserError, check_at_least
from dit_video.training import goodput
from dit_video.training.checkpoint import Checkpoints
from dit_video.training.hooks.hook import Hook
from dit_video.training.hooks.logging import MetricAccumulator, NonFiniteLossError, Progress, TooManySkipsError
from dit_video.training.preemption import handle_signals
from dit_video.training.step import get_scalars
from dit_video.training.time_recorder import TimeRecorder


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Length of a run and its intervals of logging and saving, in steps. The last step is always logged and saved.

    Raises:
      UserError: A number that is not positive.
    """

    steps: int
    log_every: int = 20
    save_every: int = 500
    max_consecutive_skips: int = 10
    """Number of consecutive steps with a non-finite loss or gradient after which the run ends."""
    preemption_grace: float = 300.0
    """Maximum number of seconds from a signal to the end of the process; preempted machines usually have about 30."""

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

    The docstring of this module describes the entries of the log and the handling of signals.

    Args:
      step: Jitted function `(state, batch) -> (state, metrics)` that increments `state.step`; it may donate the state.
        Metrics are scalar arrays and include `loss`.
      state: State to start from.
      batches: Function from the number of steps done to an iterator over the batches from there on.
      config: Length of the run and its intervals.
      checkpoints: Checkpoints to save to; None to save nothing.
      hooks: Logs and all else that happens besides the steps.
      title: Title of the progress bar.
      meta: Metadata saved with each checkpoint.
      recorder: Recorder of where the time of the run goes, which accounts for the steps of this training already.

    Raises:
      UserError: The run is beyond `config.steps`, or its folder has a later checkpoint; the data ended early; the loss
        is not finite in a step that is not skipped, or `config.max_consecutive_skips` steps were skipped; the state is
        not finite (such a state is never saved).
      GracefulStop: After a signal.
      KeyboardInterrupt: After a second signal.
    """
    steps_done = int(state.step)
    hooks = [hook for hook in hooks if jax.process_index() == 0 or not hook.first_process_only]
    saver = _Saver(checkpoints, dict(meta or {}), steps_done, hooks)
    saver.check_start(config.steps)
    for hook in hooks:
        hook.resume(steps_done)
    if steps_done == config.steps:
        return state
    recorder = TimeRecorder() if recorder is None else recorder
    max_skips = config.max_consecutive_skips
    accumulator = MetricAccumulator(steps_done, max_consecutive_skips=max_skips, hooks=hooks, recorder=recorder)
    with (
        handle_signals(steps_done, grace=config.preemption_grace) as stop,
        _close_at_end(batches(steps_done)) as iterator,
        Progress(title, config.steps, start=steps_done, visible=jax.process_index() == 0) as progress,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(recorder.charge, f"{goodput.HOOK}hook")  # after all of these
        for hook in hooks:
            stack.callback(hook.close)
        recorder.charge(goodput.STARTUP)
        while steps_done < config.steps and not stop.should_stop():
            batch = accumulator.next(iterator, stop.should_stop)
            if stop.should_stop():
                break
            with contextlib.ExitStack() as annotations:
                for hook in hooks:
                    annotations.enter_context(hook.annotate(steps_done + 1))
                annotations.enter_context(accumulator.time_compilation(batch))
                state, metrics = step(state, batch)
            steps_done += 1
            recorder.count_step(steps_done)
            with saver.handle_failures(steps_done, state, accumulator):
                accumulator.add(batch, get_scalars(metrics))
            loss = None
            is_last = steps_done == config.steps
            due_hooks = [hook for hook in hooks if hook.is_due(steps_done, is_last=is_last)]
            results: dict[str, float] = {}
            for due in due_hooks:
                with accumulator.sync_and_pause_timer(due.name):
                    results |= due.call(steps_done, state)
            if steps_done % config.log_every == 0 or is_last or results:
                with saver.handle_failures(steps_done, state, accumulator):
                    values = accumulator.compute_and_reset()
                recorder.cut(steps_done)
                with accumulator.pause_timer("hook"):
                    values |= {name: value for hook in hooks for name, value in hook.derive(values).items()}
                    values |= {**results, **get_device_memory(), "unix_seconds": time.time()}
                    loss = values["loss"]
                    saver.metrics = values
                    for hook in hooks:
                        hook.write(steps_done, values)
                if checkpoints is not None:
                    checkpoints.check()
            stop.record_step(steps_done)
            progress.update(steps_done, loss, is_timed=accumulator.is_timed)
            with accumulator.pause_timer("hook"):
                for hook in hooks:
                    hook.on_step(steps_done, state, metrics)
            if steps_done % config.save_every == 0:
                saver.save(steps_done, state, accumulator)
        saver.save(steps_done, state, accumulator)
        saver.wait()
        recorder.charge(goodput.SAVE)
        recorder.end_training(steps_done)
        if stop.acknowledge():
            raise GracefulStop(f"{title}, by {stop.signal_name} after step {steps_done}, which is saved")
    return state


def get_device_memory() -> dict[str, float]:
    """Return current and peak bytes in use on this process's first device; empty if it has no statistics (CPUs)."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    names = {"bytes_in_use": "device_memory_bytes", "peak_bytes_in_use": "device_memory_peak_bytes"}
    return {name: float(statistics[key]) for key, name in names.items() if key in statistics}


class _Saver:
    """Writer of checkpoints that saves each step once, and only finite states."""

    def __init__(
        self, checkpoints: Checkpoints | None, meta: dict[str, Any], steps_done: int, hooks: Sequence[Hook]
    ) -> None:
        self._checkpoints = checkpoints
        self._hooks = hooks
        self._meta = meta
        self._saved_step = steps_done
        self.metrics: Mapping[str, float] = {}
        """Newest entry of the log."""

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

    def save(self, steps_done: int, state: Any, accumulator: MetricAccumulator) -> None:
        """Save a state, unless it is saved already.

        Raises:
          UserError: The loss or the state is not finite.
          ValueError: The step function does not increment `state.step`.
        """
        if steps_done == self._saved_step:
            return
        with self.handle_failures(steps_done, state, accumulator):
            accumulator.fetch_metrics()
        accumulator.recorder.charge(goodput.STEP)
        accumulator.recorder.cut(steps_done)
        self._save(steps_done, state, accumulator)

    def _save(self, steps_done: int, state: Any, accumulator: MetricAccumulator) -> None:
        with accumulator.pause_timer("save"):
            if int(state.step) != steps_done:
                raise ValueError(f"state.step={int(state.step)} is wrong after {steps_done} steps: each must add 1.")
            if (path := _find_nonfinite(state)) is not None:
                raise self._make_error(f"{path} is not finite after step {steps_done}")
            if self._checkpoints is not None:
                for hook in self._hooks:
                    hook.before_save(steps_done, state)
                digests = self._checkpoints.save(steps_done, state, self._meta, metrics=self.metrics)
                for hook in self._hooks:
                    hook.on_save(steps_done, digests)
            self._saved_step = steps_done

    def wait(self) -> None:
        if self._checkpoints is not None:
            self._checkpoints.wait()

    @contextlib.contextmanager
    def handle_failures(self, steps_done: int, state: Any, accumulator: MetricAccumulator) -> Iterator[None]:
        """Turn training failures into user errors, saving the last good state first if there is one."""
        try:
            yield
        except NonFiniteLossError as error:
            raise self._make_error(str(error)) from error
        except TooManySkipsError as error:
            # Skipped steps leave the state unchanged, so it is still that from before the first of them.
            if steps_done != self._saved_step:
                self._save(steps_done, state, accumulator)
            self.wait()
            saved_note = "" if self._checkpoints is None else f" and is saved as step {steps_done}"
            raise UserError(
                f"{error}; the state is that from before them{saved_note}. Inspect the batches in skipped.jsonl. The "
                "same command resumes after them; a lower learning rate or stronger gradient clipping needs a new run."
            ) from error

    def _make_error(self, problem: str) -> UserError:
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
    # One array at a time, see `checkpoint_arrays.compute_digests`.
    return next((path for path, array in arrays.items() if not _is_finite(array)), None)


@contextlib.contextmanager
def _close_at_end(iterator: Iterator[Any]) -> Iterator[Iterator[Any]]:
    """Close a generator, or a data loader's iterator with its processes, at the end of the run."""
    try:
        yield iterator
    finally:
        if hasattr(iterator, "close"):
            iterator.close()
