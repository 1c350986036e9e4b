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
"""

import sys
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, TypeVar

from dit_video.core import config_json
from dit_video.core.errors import MissingError, UserError, get_command
from dit_video.core.files import read_document, write_json
from dit_video.core.storage import StoragePathLike
from dit_video.experiment import Experiment, StagedExperiment, datasets
from dit_video.experiment.amendments import Amendment, list_models, make_amendment
from dit_video.experiment.remote_folder import RemoteFolder
from dit_video.sampling.pipeline_config import CONFIG as PIPELINE_CONFIG
from dit_video.sampling.pipeline_config import RUN_CONFIG as CONFIG

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
          folder: folder of the run.
          experiment: its config.
          remote: folder at an address that `folder` is a copy of.

        Raises:
          UserError: the folder holds a run of another config or version, or something else.
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
        (self.folder / PIPELINE_CONFIG).unlink(missing_ok=True)
        document = {
            "format": FORMAT,
            "version": version("dit-video"),
            "command": self.command,
            "experiment": config_json.to_json(self.experiment),
        }
        if self.amendments:
            document["amendments"] = [amendment.to_json() for amendment in self.amendments]
        write_json(self.folder / CONFIG, document)
        return self

    @classmethod
    def open(cls: type[AnyRun], folder: str | Path) -> AnyRun:
        """Open the run in a folder.

        Raises:
          MissingError: the folder does not exist, or holds no run.
          UserError: a run of another version.
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
          UserError: the run has latents already, or has them elsewhere; its config caches none.
        """
        if not (isinstance(self.experiment, Experiment) and self.experiment.data.cache_latents):
            raise UserError(f"latents={destination} is invalid: the config caches no latents; leave it out")
        datasets.link_folder(self.folder / "latents", destination, "latents")

    def link_checkpoints(self, destination: StoragePathLike) -> None:
        """Link to a folder or an address for the checkpoints, which need not exist yet.

        Raises:
          UserError: the run has checkpoints already, or has them elsewhere.
        """
        for own in sorted(self.folder.glob("*/checkpoints")):
            name = own.parent.name
            raise UserError(f"{self.folder} has checkpoints of its {name}; leave out checkpoints={destination}")
        datasets.link_folder(self.folder / "checkpoints", destination, "checkpoints")
