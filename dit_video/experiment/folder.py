"""Folder of a run: its config, its clips, and where its parts lie.

experiment.json           the resolved config, and its amendments
pipeline.json             the config of its pipeline, known once the clips are
data/                     the ingested clips, or a link to them (see `link_datasets`); one folder for each data set
autoencoder/              checkpoints, metrics.jsonl, weights.safetensors, preview.safetensors (the preview decoder);
                          reconstructions/, as the config says
text_encoder.json         the identity of a frozen text encoder
image_encoder.json        the identity of an image encoder
texts/                    embeddings of the captions, where latents are not cached
latents/                  cached latents, or a link to them
excluded_clips.json       the clips that cannot be used, with the reasons, if there are any
stages/NAME/              latents, rows.json and excluded_clips.json of a stage of the curriculum
NAME/                     outputs of a stage of another package
denoiser/                 checkpoints, metrics.jsonl, hash_chain.jsonl, rows.json (content of an epoch), skipped.jsonl
                          (non-finite steps); snapshots/, samples/, evaluations/, tensorboard/, as the config says
adapter.safetensors       the trained adapter, if any, under our names
pytorch_lora_weights.safetensors   the adapter of a Wan, under diffusers' names
transformer/              all weights of a trained Wan, as diffusers reads them; transformer_2/ for its second expert
goodput/                  where the time went: a file for each start, see `training.goodput`
.programs/                compiled programs of several processes, or of a folder on shared storage
.lock, .lease-NUMBER      the lock of the folder, see `training.folder_lock`
checkpoints/              a link to the checkpoints of both models, where they lie elsewhere
pipeline/                 the result, which `dit_video.load` reads

A run that was interrupted may continue on other devices, with another attention backend, other intervals or more steps,
so that a wrong choice need not be paid for to the end. Such amendments do not change what is trained: losses stay those
of the undisturbed run up to rounding, or up to the learning rate's schedule if the number of steps changes. All other
fields are refused. The config in the folder of the run lists its amendments.
"""

import itertools
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from dit_video.core import config_json
from dit_video.core.config_json import Change, describe_changes
from dit_video.core.errors import MissingError, UserError, get_command
from dit_video.core.files import read_document, write_json
from dit_video.core.storage import StoragePathLike
from dit_video.core.version import __version__
from dit_video.experiment import datasets
from dit_video.experiment.autoencoder import WEIGHTS_FILE
from dit_video.experiment.checkpoints import list_checkpoints
from dit_video.experiment.config import Experiment
from dit_video.experiment.remote_folder import RemoteFolder
from dit_video.experiment.runtime import StagedExperiment
from dit_video.sampling.pipeline_config import CONFIG as PIPELINE_CONFIG
from dit_video.sampling.pipeline_config import RUN_CONFIG as CONFIG


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


FORMAT = 1
EXCLUDED_FILE = "excluded_clips.json"
"""Name of the list of the clips that a training excludes, and of the held-out ones that cannot be used."""
AnyRun = TypeVar("AnyRun", bound="RunFolder")


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Folder with the config of a run, made by `create` or `open`."""

    folder: Path
    experiment: StagedExperiment
    command: str
    """Command that started the run, or the last one that amended it."""
    amendments: tuple[Amendment, ...] = ()
    """Changes to the config since the run was started, in order."""
    remote: RemoteFolder | None = field(default=None, compare=False, repr=False)
    """Folder at an address that `folder` is a copy of; None for a run on this machine, or on a shared disk."""
    experiment_class: ClassVar[type[StagedExperiment]] = StagedExperiment
    """Class of the experiments that this class runs."""

    @classmethod
    def create(
        cls: type[AnyRun], folder: str | Path, experiment: StagedExperiment, *, remote: RemoteFolder | None = None
    ) -> AnyRun:
        """Create a run, or open the one in this folder.

        The config of a run that has begun to train may differ in fields that do not change what is trained; see
        `amendments`.

        Args:
          folder: Folder of the run.
          experiment: Its config.
          remote: Folder at an address that `folder` is a copy of.

        Raises:
          UserError: If the folder holds a run of another config or version, or something else; or other processes
            cannot import a class of the config.
        """
        folder = Path(folder)
        run = cls(folder=folder, experiment=experiment, command=get_command(), remote=remote)
        if (folder / CONFIG).is_file():
            existing = replace(cls.open(folder), remote=remote)
            configs = config_json.to_json(existing.experiment), config_json.to_json(experiment)
            if not (changes := config_json.list_changes(*configs)):
                return existing
            if not any((folder / model).exists() for model in list_models(existing.experiment)):
                return run._write_config()  # nothing was trained yet, so that the config may still change
            amendment = make_amendment(folder, existing.experiment, experiment, changes, command=run.command)
            print(f"amended: {amendment}", file=sys.stderr)
            return replace(run, amendments=(*existing.amendments, amendment))._write_config()
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; use a folder")
        if folder.is_dir() and any(entry.name != "clips" and entry.name[0] != "." for entry in folder.iterdir()):
            raise UserError(f"{folder} is not empty and holds no run; use another folder")
        return run._write_config()

    def _write_config(self: AnyRun) -> AnyRun:
        """Write the config, and return the run. A pipeline's config that follows from another one goes."""
        document = {
            "format": FORMAT,
            "version": __version__,
            "command": self.command,
            "experiment": config_json.to_portable_json(self.experiment),
        }
        if self.amendments:
            document["amendments"] = [amendment.to_json() for amendment in self.amendments]
        (self.folder / PIPELINE_CONFIG).unlink(missing_ok=True)
        write_json(self.folder / CONFIG, document)
        return self

    @classmethod
    def open(cls: type[AnyRun], folder: str | Path) -> AnyRun:
        """Open the run in a folder.

        Raises:
          MissingError: If the folder does not exist, or holds no run.
          UserError: If the run is of another version.
        """
        folder = Path(folder)
        if not (folder / CONFIG).is_file():
            raise MissingError(f"no such run: {folder} has no {CONFIG}")
        document = read_document(folder / CONFIG, format=FORMAT, kind="run", fix="start it anew")
        experiment = config_json.from_json(document.get("experiment"))
        if not isinstance(experiment, cls.experiment_class):
            raise UserError(
                f"{folder / CONFIG} holds no experiment for {cls.__name__}; start the run anew in another folder"
            )
        amendments = tuple(map(Amendment.from_json, document.get("amendments", [])))
        return cls(folder=folder, experiment=experiment, command=str(document.get("command")), amendments=amendments)

    def link_latents(self, destination: StoragePathLike) -> None:
        """Link to a folder or an address for the cached latents, which need not exist yet.

        Raises:
          UserError: If the run has latents already, here or elsewhere, or if its config caches none.
        """
        if not (isinstance(self.experiment, Experiment) and self.experiment.data.cache_latents):
            raise UserError(f"latents={destination} is invalid: the config caches no latents; leave it out")
        datasets.link_folder(self.folder / "latents", destination, "latents")

    def link_checkpoints(self, destination: StoragePathLike) -> None:
        """Link to a folder or an address for the checkpoints, which need not exist yet.

        Raises:
          UserError: If the run has checkpoints already, here or elsewhere.
        """
        for own in sorted(self.folder.glob("*/checkpoints")):
            name = own.parent.name
            raise UserError(f"{self.folder} has checkpoints of its {name}; leave out checkpoints={destination}")
        datasets.link_folder(self.folder / "checkpoints", destination, "checkpoints")


def make_amendment(
    folder: Path, old: StagedExperiment, new: StagedExperiment, changes: Sequence[Change], *, command: str
) -> Amendment:
    """Return the amendment of a run in a folder.

    Args:
      folder: Folder of the run.
      old: Config of the run.
      new: Config that it is to continue with.
      changes: Their differences.
      command: Command that continues it.

    Raises:
      UserError: If a change would affect what is trained, or if it changes the number of steps of a training that is
        finished or beyond the new number.
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
