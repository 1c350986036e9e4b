"""Amendments: changes to the config of a run that has begun.

A run that was interrupted may continue on other devices, with another attention backend, other intervals or more steps,
so that a wrong choice need not be paid for to the end. Such amendments do not change what is trained: losses stay those
of the undisturbed run up to rounding, or up to the learning rate's schedule if the number of steps changes. All other
fields are refused. The config in the folder of the run lists its amendments.
"""

import itertools
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_video.core.config_json import Change, describe_changes
from dit_video.core.errors import UserError
from dit_video.experiment.autoencoder import WEIGHTS_FILE
from dit_video.experiment.checkpoints import list_checkpoints
from dit_video.experiment.training_config import DenoiserTraining


@dataclass(frozen=True, kw_only=True)
class Amendment:
    """Changes to the config of a run that were made at one of its starts."""

    time: str
    """Time of that start, as `YYYY-MM-DD HH:MM:SS`."""
    command: str
    """Command of that start."""
    steps: dict[str, int]
    """Step of the newest checkpoint of each model that had one."""
    changes: tuple[Change, ...]
    """Changed fields of the config."""

    def __str__(self) -> str:
        return ", ".join(f"{change.path} {change.old!r} -> {change.new!r}" for change in self.changes)

    def to_json(self) -> dict[str, Any]:
        """Return the amendment as JSON."""
        return {**vars(self), "changes": [change._asdict() for change in self.changes]}

    @classmethod
    def from_json(cls, value: Any) -> "Amendment":
        """Return the amendment that `to_json` has written."""
        return cls(**{**value, "changes": tuple(Change(**change) for change in value["changes"])})


def describe_stages(experiment: dict[str, Any]) -> dict[str, Any]:
    """Return an experiment's JSON with each stage under its name, so that a change is that of `denoiser.steps`.

    A stage with an experiment of its own has that one's fields: `prior.denoiser.steps`.
    """
    stages = {}
    for stage in experiment["stages"]:
        values = {name: value for name, value in stage.items() if name not in ("name", "experiment")}
        nested = describe_stages(stage["experiment"]) if "experiment" in stage else {}
        stages[stage["name"]] = values | nested
    return experiment | {"stages": list(stages)} | stages


def make_amendment(
    folder: Path,
    old: Sequence[DenoiserTraining],
    new: Sequence[DenoiserTraining],
    changes: Sequence[Change],
    *,
    models: Iterable[str],
    amendable: Sequence[str],
    command: str,
) -> Amendment:
    """Return the amendment of a run in a folder.

    Args:
      folder: Folder of the run.
      old: Stages of the denoiser in the config of the run.
      new: Stages of the denoiser in the config that it is to continue with.
      changes: Differences of the configs.
      models: Names of the models that the run trains.
      amendable: Fields that may change.
      command: Command that continues the run.

    Raises:
      UserError: If a change would affect what is trained, or if it changes the number of steps of a training that is
        finished or beyond the new number.
    """
    if refused := [change for change in changes if not _is_covered(change.path, amendable)]:
        differences = describe_changes(refused)
        raise UserError(f"{folder} holds a run of another config ({differences}); use another, or remove it")
    newest = {name: max((saved.step for saved in list_checkpoints(folder, name)), default=0) for name in models}
    _check_autoencoder_steps(folder, changes, newest.get("autoencoder", 0))
    _check_denoiser_steps(folder, old, new, newest.get("denoiser", 0))
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    steps = {name: step for name, step in newest.items() if step}
    return Amendment(time=now, command=command, steps=steps, changes=tuple(changes))


def _is_covered(path: str, fields: Iterable[str]) -> bool:
    """Return whether a path is one of the fields, or lies inside of one."""
    return any(re.match(rf"{re.escape(field)}(?![^.\[])", path) for field in fields)


def _check_autoencoder_steps(folder: Path, changes: Sequence[Change], trained: int) -> None:
    """Raise if the length of a training changes whose result is in use, or that is beyond the new length."""
    for change in changes:
        if change.path != "autoencoder.steps":
            continue
        if (folder / WEIGHTS_FILE).exists():
            rule = "its autoencoder is trained, and the denoiser depends on it"
            raise UserError(f"autoencoder.steps of the run in {folder} cannot change: {rule}. Use another folder.")
        if change.new < trained:
            rule = f"the newest checkpoint is step {trained}"
            raise UserError(f"autoencoder.steps={change.new} is too small: {rule}. Use {trained} or more.")


def _check_denoiser_steps(
    folder: Path, old: Sequence[DenoiserTraining], new: Sequence[DenoiserTraining], trained: int
) -> None:
    """Raise if the end of a stage changes that is finished, or comes before the newest checkpoint."""
    old_ends, new_ends = (list(itertools.accumulate(stage.steps for stage in stages)) for stages in (old, new))
    if old_ends != new_ends and not trained and (folder / "pipeline").is_dir():
        rule = "the run is finished, and its denoiser has no checkpoints any more"
        raise UserError(f"the steps of the denoiser in {folder} cannot change: {rule}. Use another folder.")
    for stage, old_end, new_end in zip(new, old_ends, new_ends, strict=True):
        if old_end != new_end and trained > old_end:
            raise UserError(
                f"{stage.name}.steps cannot change: its stage ended at step {old_end}, but the newest checkpoint is "
                f"step {trained}. Use the previous number of steps, or change that of a later stage."
            )
        if old_end != new_end and trained > new_end:
            raise UserError(
                f"{stage.name}.steps is too small: its stage would end at step {new_end}, and the newest checkpoint is "
                f"step {trained}. Use {trained - new_end} steps more, or a larger number."
            )
