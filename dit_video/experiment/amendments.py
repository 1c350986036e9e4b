"""Amendments: changes to the config of a run that was started, which do not change what is trained.

A run that was interrupted may continue on other devices, with another attention backend, other intervals or more steps,
so that a wrong choice need not be paid for to the end. Losses stay those of the undisturbed run up to rounding, or up
to the learning rate's schedule if the number of steps changes. All other fields are refused. The config in the folder
of the run lists its amendments.
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
from dit_video.experiment import Experiment, StagedExperiment
from dit_video.experiment.autoencoder import WEIGHTS_FILE
from dit_video.experiment.checkpoints import list_checkpoints


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


def make_amendment(
    folder: Path, old: StagedExperiment, new: StagedExperiment, changes: Sequence[Change], *, command: str
) -> Amendment:
    """Return the amendment of a run in a folder.

    Args:
      folder: folder of the run.
      old: config of the run.
      new: config that it is to continue with.
      changes: their differences.
      command: command that continues it.

    Raises:
      UserError: a change would change what is trained, or the number of steps of a training that is finished, or that
        is beyond the new number.
    """
    if refused := [change for change in changes if not _is_covered(change.path, new.amendable_fields)]:
        differences = describe_changes(refused)
        raise UserError(f"{folder} holds a run of another config ({differences}); use another, or remove it")
    steps = _find_newest_steps(folder, list_models(old))
    if isinstance(old, Experiment) and isinstance(new, Experiment):
        _check_autoencoder_steps(folder, changes, steps.get("autoencoder", 0))
        _check_denoiser_steps(folder, old, new, steps.get("denoiser", 0))
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    return Amendment(time=now, command=command, steps=steps, changes=tuple(changes))


def list_models(experiment: StagedExperiment) -> tuple[str, ...]:
    """Return the names of the models that a run may train, each in a folder of its own."""
    return ("autoencoder", "denoiser", *(stage.name for stage in experiment.stages))


def _is_covered(path: str, fields: Iterable[str]) -> bool:
    """Return whether a path is one of the fields, in which [] stands for any index, or lies inside of one."""
    patterns = (re.escape(field).replace(r"\[\]", r"\[\d+\]") for field in fields)
    return any(re.match(rf"{pattern}(?![^.\[])", path) for pattern in patterns)


def _find_newest_steps(folder: Path, models: Iterable[str]) -> dict[str, int]:
    newest = {name: max((saved.step for saved in list_checkpoints(folder, name)), default=0) for name in models}
    return {name: step for name, step in newest.items() if step}


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


def _check_denoiser_steps(folder: Path, old: Experiment, new: Experiment, trained: int) -> None:
    """Raise if the end of a stage changes that is finished, or comes before the newest checkpoint."""
    if _list_stage_ends(old) != _list_stage_ends(new) and not trained and (folder / "pipeline").is_dir():
        rule = "the run is finished, and its denoiser has no checkpoints any more"
        raise UserError(f"the steps of the denoiser in {folder} cannot change: {rule}. Use another folder.")
    names = [f"curriculum[{number}].steps" for number in range(len(old.curriculum))] + ["denoiser.steps"]
    for name, old_end, new_end in zip(names, _list_stage_ends(old), _list_stage_ends(new), strict=True):
        if old_end != new_end and trained > old_end:
            raise UserError(
                f"{name} cannot change: its stage ended at step {old_end}, but the newest checkpoint is step "
                f"{trained}. Use the previous number of steps, or change that of a later stage."
            )
        if old_end != new_end and trained > new_end:
            raise UserError(
                f"{name} is too small: its stage would end at step {new_end}, and the newest checkpoint is step "
                f"{trained}. Use {trained - new_end} steps more, or a larger number."
            )


def _list_stage_ends(experiment: Experiment) -> list[int]:
    steps = (*(stage.steps for stage in experiment.curriculum), experiment.denoiser.steps)
    return list(itertools.accumulate(steps))
