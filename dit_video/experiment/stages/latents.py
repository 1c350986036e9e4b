"""Stages of the denoiser's curriculum, which share one training, and the stage that caches their latents."""

import time
from dataclasses import dataclass
from pathlib import Path

from dit_video.core.storage import StoragePath
from dit_video.data.latents import offline
from dit_video.data.latents import plan as latent_plan
from dit_video.data.latents.cache import LatentSource
from dit_video.data.tables import MANIFEST
from dit_video.experiment import datasets, input_pipeline
from dit_video.experiment.autoencoder import read_autoencoder
from dit_video.experiment.config import Experiment
from dit_video.experiment.encoders import open_text_encoder
from dit_video.experiment.runtime import Runtime, Stage
from dit_video.experiment.stages.autoencoder import TrainAutoencoder
from dit_video.training.hooks.logging import Progress, print_on_first_process
from dit_video.weights.frozen_encoders import IDENTITY_FILE, open_image_encoder


@dataclass(frozen=True, kw_only=True)
class DenoiserStage(Stage):
    """A stage of the denoiser: the last one, or one of the curriculum that leads to it.

    All have the checkpoints and logs of one training, in the folder `denoiser`, and are done once it is beyond them.
    """

    experiment: Experiment
    """The experiment, with the data and the training of this stage."""
    name: str
    curriculum: str = ""
    """Name of the stage in the curriculum; empty for the last one."""
    start_step: int = 0
    """Number of steps of the stages before this one."""

    @property
    def end_step(self) -> int:
        """Return the number of steps of the training up to the end of this stage."""
        return self.start_step + self.experiment.denoiser.steps

    def get_folder(self, runtime: Runtime) -> Path:
        """Return the folder of this stage's own files."""
        return runtime.folder / "stages" / self.curriculum if self.curriculum else runtime.folder

    def is_trained(self, runtime: Runtime) -> bool:
        """Return whether nothing of this stage is needed any more: it is trained, and the last one is exported."""
        newest = runtime.open_checkpoints("denoiser").latest()
        if self.curriculum:
            return (newest or 0) >= self.end_step
        # The pipeline of a finished run, which may be trained further, and whose checkpoints may be gone.
        return (runtime.folder / "pipeline").is_dir() and (newest is None or newest >= self.end_step)


@dataclass(frozen=True, kw_only=True)
class CacheLatents(DenoiserStage):
    """Encoding of the training clips, with their captions where the text encoder is frozen."""

    def list_inputs(self, runtime: Runtime) -> tuple[StoragePath, ...]:
        return TrainAutoencoder(experiment=self.experiment).list_outputs(runtime)

    def list_outputs(self, runtime: Runtime) -> tuple[StoragePath, ...]:
        return (self._get_destination(runtime) / MANIFEST,)

    def is_done(self, runtime: Runtime) -> bool:
        return self.is_trained(runtime) or super().is_done(runtime)

    def run(self, runtime: Runtime) -> None:
        runtime = runtime.for_stage(self.experiment)
        encoding, clips = self.make_encoding(runtime), runtime.training_clips
        destination = self._get_destination(runtime)
        identity, plan = (
            latent_plan.compute_latent_identity(encoding),
            latent_plan.plan_encoding(clips, encoding, destination),
        )
        with Progress("encoding latents", len(plan.views), unit="clip") as progress:
            finished = offline.encode_latents(
                destination,
                clips,
                encoding,
                plan,
                identity=identity,
                shard=runtime.process,
                shards=runtime.process_count,
                progress=progress.update,
            )
        while not finished:  # other processes are still writing their files
            time.sleep(1)
            finished = offline.finish_latents(destination, clips, encoding, plan, identity=identity)

    def open(self, runtime: Runtime, *, encoding: latent_plan.Encoding | None = None) -> LatentSource:
        """Return the cached latents.

        Args:
          runtime: The run.
          encoding: The encoding of the clips, if it is made already; it reads the autoencoder's weights.

        Raises:
          UserError: If the latents are of other clips or of another autoencoder.
        """
        runtime = runtime.for_stage(self.experiment)
        encoding = self.make_encoding(runtime) if encoding is None else encoding
        source = LatentSource(self._get_destination(runtime), identity=latent_plan.compute_latent_identity(encoding))
        latent_plan.check_clips(source, runtime.training_clips, encoding.columns)
        if source.skipped:
            name, reason, *_ = source.skipped[0]
            count = len(source.skipped)
            print_on_first_process(f"{count} clips could not be encoded and are skipped, such as {name}: {reason}")
        return source

    def make_encoding(self, runtime: Runtime) -> latent_plan.Encoding:
        """Return the encoding of the clips.

        Raises:
          MissingError: If the autoencoder is not trained yet.
        """
        experiment, images = self.experiment, None
        if (folder := experiment.denoiser.image_encoder) is not None:
            images = open_image_encoder(folder, identity_file=runtime.folder / IDENTITY_FILE)
        params = read_autoencoder(experiment.autoencoder, runtime.folder, command=runtime.command)
        text_encoder = open_text_encoder(experiment, runtime)
        return input_pipeline.make_encoding(experiment, params, text_encoder=text_encoder, images=images)

    def link_destination(self, runtime: Runtime) -> None:
        """Let the latents of a run at an address lie there, if they have no other place."""
        folder = self.get_folder(runtime) / "latents"
        if runtime.remote is not None and not folder.exists():
            datasets.link_folder(folder, runtime.remote.address / folder.relative_to(runtime.folder), "latents")

    def _get_destination(self, runtime: Runtime) -> StoragePath:
        return datasets.resolve(self.get_folder(runtime) / "latents")
