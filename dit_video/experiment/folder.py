"""The folder of a run: its config, its clips, and where its parts lie.

experiment.json           the resolved config
data/                     the ingested clips, or a link to them (see `intake`); of several data sets one folder each
autoencoder/              checkpoints, metrics.jsonl, weights.safetensors
text_encoder.json         the identity of a frozen text encoder
image_encoder.json        that of an image encoder
texts/                    its embeddings of the captions, where latents are not cached
latents/                  what the denoiser is trained on, or a link to it
denoiser/                 checkpoints, metrics.jsonl, rows.json (what an epoch holds), skipped.jsonl (steps that
                          were not finite); snapshots/, samples/, tensorboard/, as the config says
adapter.safetensors       the trained adapter, where one is trained, with our names
pytorch_lora_weights.safetensors   the same of Wan, with diffusers' names
transformer/              all weights of Wan, where these are trained, as diffusers reads them; of the second of two
                          experts transformer_2/
checkpoints/              a link to those of both models, where they lie elsewhere
pipeline/                 the result: what `dit_video.load` reads
"""

import functools
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, TypeVar

from dit_video.core import config_json
from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import read_document, write_json
from dit_video.core.storage import Address
from dit_video.data.clips import ClipSource
from dit_video.experiment import Experiment, datasets

FORMAT = 1
CONFIG = "experiment.json"
AnyRun = TypeVar("AnyRun", bound="RunFolder")


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A folder with the config of a run. `create` or `open` makes it."""

    folder: Path
    experiment: Experiment
    command: str
    """what it was started with"""

    @classmethod
    def create(cls: type[AnyRun], folder: str | Path, experiment: Experiment) -> AnyRun:
        """A new run, or the one in this folder if its config is the same.

        Raises:
          UserError: the folder holds a run of another config or version, or something else.
        """
        folder = Path(folder)
        run = cls(folder=folder, experiment=experiment, command=" ".join(["python", *sys.argv]))
        if (folder / CONFIG).is_file():
            existing = cls.open(folder)
            difference = config_json.difference(
                config_json.to_json(existing.experiment), config_json.to_json(experiment)
            )
            if not difference:
                return existing
            if any((folder / part).exists() for part in ("autoencoder", "denoiser")):
                raise UserError(
                    f"{folder} holds a run of another config ({difference}); use another folder or remove it"
                )
            return run._written()  # nothing was trained yet: a start that failed can be corrected
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; a run needs a folder of its own")
        if folder.is_dir() and any(entry.name != "clips" and entry.name[0] != "." for entry in folder.iterdir()):
            raise UserError(f"{folder} is not empty and holds no run; use another folder")
        return run._written()

    def _written(self: AnyRun) -> AnyRun:
        """Itself, with its config in its folder."""
        document = {
            "format": FORMAT,
            "version": version("dit-video"),
            "command": self.command,
            "experiment": config_json.to_json(self.experiment),
        }
        write_json(self.folder / CONFIG, document)
        return self

    @classmethod
    def open(cls: type[AnyRun], folder: str | Path) -> AnyRun:
        """The run in a folder.

        Raises:
          MissingError: no such folder, or no run in it.
          UserError: a run of another version.
        """
        folder = Path(folder)
        if not (folder / CONFIG).is_file():
            raise MissingError(f"no such run: {folder} has no {CONFIG}")
        document = read_document(folder / CONFIG, format=FORMAT, what="run", otherwise="start it anew")
        experiment = config_json.from_json(document.get("experiment"))
        if not isinstance(experiment, Experiment):
            raise UserError(f"{folder / CONFIG} holds no experiment; start the run anew in another folder")
        return cls(folder=folder, experiment=experiment, command=str(document.get("command")))

    def keep_latents(self, destination: Address) -> None:
        """Have the cached latents elsewhere: a folder or an address, which need not hold any yet.

        Raises:
          UserError: the run has latents already, or has them elsewhere; its config caches none.
        """
        if not self.experiment.data.cache_latents:
            raise UserError(f"the config caches no latents, {destination} was named for them; leave it out")
        datasets.link(self.folder / "latents", destination, "latents")

    def keep_checkpoints(self, destination: Address) -> None:
        """Have the checkpoints elsewhere: a folder or an address, which need not hold any yet.

        Raises:
          UserError: the run has checkpoints already, or has them elsewhere.
        """
        for model in ("autoencoder", "denoiser"):
            if (self.folder / model / "checkpoints").exists():
                raise UserError(
                    f"{self.folder} has checkpoints of its {model} already, {destination} was named for them"
                )
        datasets.link(self.folder / "checkpoints", destination, "checkpoints")

    def checkpoints_of(self, model: Literal["autoencoder", "denoiser"]) -> str | Path:
        """Where the checkpoints of a model are, or will be."""
        elsewhere = self.folder / "checkpoints"
        if elsewhere.is_symlink() or elsewhere.is_dir():
            return str(datasets.lies(elsewhere) / model)
        return self.folder / model / "checkpoints"

    @functools.cached_property
    def clips(self) -> ClipSource:
        """All ingested clips."""
        return datasets.taken(self.folder / "data")

    @property
    def training_clips(self) -> ClipSource:
        """The split `train`, without what the config holds out."""
        return self.clips.without(self.experiment.data.held_out).split("train")

    @property
    def held_out_clips(self) -> ClipSource:
        """What the config names; without names the split `validation`."""
        held_out = self.experiment.data.held_out
        return self.clips.select(held_out) if held_out else self.clips.split("validation")
