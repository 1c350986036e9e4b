"""Replay of a stretch of a training, compared with its hash chain.

The result is the same bits, the same values up to rounding, or the first difference. On the devices of the run, every
batch, loss and saved array has the same bits. On another number of devices the batches do, but sums are formed in
another order: over tens of steps, losses agree to 1e-6 (measured on 1, 2, 4 and 8 devices).
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from dit_video.core import trees
from dit_video.core.config_json import Change, list_changes
from dit_video.core.errors import MissingError, UserError
from dit_video.distributed import Parallelism
from dit_video.experiment.run import Run, Stage, Training
from dit_video.experiment.stages.denoiser import TrainDenoiser
from dit_video.training.digests import compute_digests
from dit_video.training.hooks.hash_chain import CHAIN_FILE, Record, make_step_record, read_chain

TOLERANCES = {"loss": 1e-6, "gradient_norm": 5e-6}
"""Largest relative differences of the values of a step on another mesh."""
STATE_TOLERANCE = 1e-4
"""Largest difference of an array on another mesh, relative to its largest value; where that is below 1, absolute. Adam
amplifies the rounding of gradients that are zero in exact arithmetic."""

_ROUNDED_STEPS = 50
"""Largest number of steps that are replayed by default where sums are formed in another order."""

ReplayResult = Literal["same bits", "within 1e-6", "differs"]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first difference between a run and its replay."""

    step: int
    """Step at which it appears."""
    kind: Literal["batch", "loss", "gradient_norm", "state"]
    """Kind of value that differs, in the order in which a step uses or makes them."""
    name: str = ""
    """Path of the array, of a batch or state."""
    recorded: str
    """Value or digest in the chain."""
    replayed: str
    """Value or digest of the replay."""

    def __str__(self) -> str:
        what = {"batch": f"array {self.name} of the batch", "state": f"array {self.name} of the state"}
        return f"{what.get(self.kind, self.kind)} of step {self.step} is {self.recorded} there and {self.replayed} here"


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The result of a replay."""

    model: str
    """Name of the model whose training was replayed."""
    first: int
    """Step that the replay began with, whose checkpoint was restored; 0 for the initial state."""
    last: int
    """Last step of the replay."""
    result: ReplayResult
    difference: Difference | None
    """First difference; None without one."""
    max_errors: dict[str, float]
    """Largest relative differences of the values of a step."""
    compared_states: tuple[int, ...]
    """Steps whose saved states were compared, too."""
    changes: tuple[Change, ...]
    """Further differences from the start of that stretch: versions of the code, devices, mesh, config."""


def replay(
    run: Run,
    *,
    model: str = "denoiser",
    first: int | None = None,
    last: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Replay:
    """Replay a stretch of a training on the devices of the run, and compare it with the hash chain.

    Args:
      run: The run; another mesh in its config replays on that mesh.
      model: Name of the trained model.
      first: Step of a checkpoint that is kept, or 0; by default the newest one before `last`.
      last: Last step to repeat; by default the newest one of the chain, but on other devices than the run's at most 50
        steps after the first, as rounding adds up.
      progress: Called with the number of repeated steps, and of all.

    Raises:
      MissingError: If the model is not trained, or has no chain.
      UserError: If the chain was changed after it was written, or if there is no such stretch.
    """
    records = read_chain(run.folder / model / CHAIN_FILE)
    steps = {record["step"]: record for record in records if "batch" in record}
    states = {record["step"]: record["state"] for record in records if "state" in record}
    if not steps:
        raise MissingError(f"the hash chain of the {model} in {run.folder} has no steps yet. Train first.")
    starts = {record["step"]: record["start"] for record in records if "start" in record}
    known = steps.keys() | states.keys() | starts.keys()
    kept = sorted(step for step in run.open_checkpoints(model).list_steps() if step in known)
    first, end = _choose_stretch(kept, first, max(steps) if last is None else last, newest=max(steps))
    if first < min(starts):
        raise UserError(
            f"first={first} is invalid: the hash chain begins at step {min(starts)}. Use that or a later one."
        )
    stage = _find_stage(run, model, first, end)
    training = stage.open_training(run, is_new=first == 0)
    if training is None:
        raise UserError(f"the steps of the {model} cannot be repeated: its stage does not open its training.")
    changes = {
        step: list_changes(start, training.trainer.describe_start(start["plan"])) for step, start in starts.items()
    }
    begin = start = max(step for step in starts if step <= first)
    if last is None and any(map(_changes_rounding, changes[start])):
        end = min(end, first + _ROUNDED_STEPS)
    for step in (start, *(step for step in starts if first < step < end)):
        _check_schedule(changes[step])
    comparison = _Comparison()
    with contextlib.closing(training.trainer.replay(training.open_batches, first)) as replayed:
        for step, (state, metrics) in enumerate(itertools.islice(replayed, end - first), first + 1):
            begin = step - 1 if step - 1 in starts else begin
            comparison.is_exact &= not any(map(_changes_rounding, changes[begin]))
            comparison.compare_step(steps.get(step), make_step_record(step, jax.device_get(metrics)))
            if step in states and not comparison.is_ended:
                comparison.compare_state(step, state, states[step], training if step in kept else None)
            if progress is not None:
                progress(step - first, end - first)
            if comparison.is_ended:
                break
    return Replay(
        model=model,
        first=first,
        last=end,
        result=comparison.result,
        difference=comparison.difference,
        max_errors=comparison.max_errors,
        compared_states=tuple(comparison.compared_states),
        changes=changes[start],
    )


def with_parallelism(run: Run, parallel: Parallelism) -> Run:
    """Return a run on another mesh, which its stages have, too."""
    experiment = dataclasses.replace(run.experiment, parallel=parallel)
    for stage in experiment.denoiser_stages:
        experiment = experiment.replace_stage(stage.name, parallel=None)
    return dataclasses.replace(run, experiment=experiment)


class _Comparison:
    """The comparison of a replay with what was recorded, up to the first difference that is no rounding."""

    def __init__(self) -> None:
        self.is_exact = True
        """True where the run had the devices and programs of the replay at the current step."""
        self.difference: Difference | None = None
        self.is_ended = False
        """True after a difference beyond rounding."""
        self.max_errors = dict.fromkeys(TOLERANCES, 0.0)
        self.compared_states: list[int] = []

    @property
    def result(self) -> ReplayResult:
        if self.is_ended:
            return "differs"
        return "same bits" if self.difference is None else "within 1e-6"

    def compare_step(self, recorded: Record | None, replayed: Record) -> None:
        step = replayed["step"]
        if recorded is None:
            raise UserError(f"the hash chain has no record of step {step}. Replay another stretch.")
        for name, digest in replayed["batch"].items():
            if (other := recorded["batch"].get(name, "missing")) != digest:
                self._note(True, step=step, kind="batch", name=name, recorded=other, replayed=digest)
                return
        for kind, tolerance in TOLERANCES.items():
            old, new = (float.fromhex(record[kind]) for record in (recorded, replayed))
            if recorded[kind] == replayed[kind]:
                continue
            error = abs(new - old) / max(abs(old), 1e-30)
            self.max_errors[kind] = max(self.max_errors[kind], error)
            is_beyond = self.is_exact or not error <= tolerance
            self._note(is_beyond, step=step, kind=kind, recorded=f"{old!r}", replayed=f"{new!r}")
            if is_beyond:
                return

    def compare_state(self, step: int, state: Any, digests: Mapping[str, str], training: Training | None) -> None:
        """Compare a state with the digests of the one that was saved; `training` restores that one for its values."""
        arrays = trees.flatten(state)
        own = {path: f"{digest:08x}" for path, digest in compute_digests(arrays).items()}
        self.compared_states.append(step)
        differing = [path for path in own if own[path] != digests.get(path)]
        if not differing:
            return
        if not self.is_exact and training is not None:
            saved = trees.flatten(training.trainer.restore(step))
            differing = [path for path in differing if not _is_close(arrays[path], saved[path])]
        elif not self.is_exact:
            differing = []  # rounding changes digests, and the values are not kept
        for path in differing[:1]:
            recorded = digests.get(path, "missing")
            self._note(True, step=step, kind="state", name=path, recorded=recorded, replayed=own[path])

    def _note(self, is_beyond: bool, **values: Any) -> None:
        if self.difference is None or is_beyond:
            self.difference = Difference(**values)
        self.is_ended = is_beyond


def _is_close(one: Any, other: Any) -> bool:
    if not jax.numpy.issubdtype(one.dtype, jax.numpy.floating):
        return True  # counters have no rounding, and keys are compared by the batches and losses that they lead to
    one, other = (np.asarray(array, np.float64) for array in (one, other))
    return bool(np.abs(one - other).max(initial=0) <= STATE_TOLERANCE * max(1.0, np.abs(other).max(initial=0)))


def _choose_stretch(kept: Sequence[int], first: int | None, last: int, *, newest: int) -> tuple[int, int]:
    if last > newest:
        raise UserError(f"last={last} is invalid: the newest step of the hash chain is {newest}. Use that or less.")
    if first is None:
        first = max((step for step in kept if step < last), default=0)
    if first not in (0, *kept):
        steps = ", ".join(map(str, (0, *kept)))
        raise UserError(f"first={first} is invalid: it must be 0 or the step of a checkpoint. Use one of {steps}.")
    if last <= first:
        raise UserError(f"last={last} is invalid: it must be above first={first}. Use a later step.")
    return first, last


def _find_stage(run: Run, model: str, first: int, last: int) -> Stage:
    """Return the stage that a stretch lies in.

    Raises:
      UserError: If no stage trains the model, or the stretch lies in several.
    """
    for stage in run.stages:
        if isinstance(stage, TrainDenoiser):
            start = stage.get_start_step(run)
            is_covered = model == "denoiser" and start <= first and last <= start + stage.steps
        else:
            is_covered = stage.name == model
        if is_covered:
            return stage
    raise UserError(f"no stage of the run trains the {model} from step {first} to {last}. Use a stretch of one stage.")


def _check_schedule(changes: Sequence[Change]) -> None:
    """Raise if the learning rate has followed another schedule than it would in a replay."""
    for change in changes:
        if change.path.endswith(".steps"):
            rule = f"it was trained with {change.path.removeprefix('config.')}={change.old}, which was amended"
            raise UserError(f"that stretch cannot be replayed: {rule}. Use a later stretch.")


def _changes_rounding(change: Change) -> bool:
    """Return whether the same steps may round otherwise after a change."""
    rounding = ("devices", "mesh", "code.jax", "code.jaxlib", "code.flags", "config.model", "config.parallel")
    return change.path.startswith(rounding) or change.path.endswith((".accumulation_steps", ".parallel"))
