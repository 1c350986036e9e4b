"""Training run: its stages, one after the other, in one folder.

Every stage leaves its outputs in the folder, whole or not at all, and is not repeated; trainings continue from their
checkpoints. An interrupted run is therefore continued by the same command. `folder` lists the files. Only `train` and
`run_stages` compute; everything else reads what is there.
"""

import functools
from dataclasses import dataclass, replace
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh

from dit_video.core.errors import UserError
from dit_video.core.offload import Offload
from dit_video.core.storage import StoragePathLike
from dit_video.data.latents.cache import LatentSource
from dit_video.data.latents.codec import LatentCodec
from dit_video.data.latents.plan import Encoding
from dit_video.distributed import MeshConfig, make_mesh, make_shardings
from dit_video.distributed.mesh import resolve_mesh
from dit_video.evaluation.evaluate import EvaluationClips
from dit_video.experiment import datasets, export, monitors
from dit_video.experiment.autoencoder import read_autoencoder
from dit_video.experiment.config import Experiment
from dit_video.experiment.denoiser import make_denoiser_loss, make_denoiser_step, open_trainable_denoiser
from dit_video.experiment.folder import RunFolder
from dit_video.experiment.runtime import Runtime, Stage
from dit_video.experiment.stages.autoencoder import TrainAutoencoder
from dit_video.experiment.stages.denoiser import TrainDenoiser
from dit_video.experiment.stages.latents import CacheLatents
from dit_video.families import get_lora_modules
from dit_video.models.autoencoders import LinearAutoencoder
from dit_video.sampling.loading import load_pipeline
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.pipeline_config import CONFIG as PIPELINE_CONFIG
from dit_video.sampling.pipeline_config import PipelineConfig, read_pipeline_config, write_pipeline_config
from dit_video.training import goodput
from dit_video.training.state import get_shapes_on_devices

_Location = StoragePathLike | None


@dataclass(frozen=True, kw_only=True)
class StagedRun(RunFolder):
    """A run of any stages in its folder, made by `create` or `open`."""

    profile: tuple[int, int] | None = None
    """First and last step that are traced."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Return the stages in order."""
        return self.experiment.stages

    @functools.cached_property
    def runtime(self) -> Runtime:
        """Return the folder, devices and clips that all stages share."""
        return Runtime(
            folder=self.folder,
            experiment=self.experiment,
            command=self.command,
            remote=self.remote,
            profile=self.profile,
        )

    def prepare(self, *clips: StoragePathLike, latents: _Location = None, checkpoints: _Location = None) -> None:
        """Link the clips, and check everything that can be checked before the first stage begins.

        For a run at an address, its data set, latents and checkpoints are stored there, too, unless other places are
        given.

        Args:
          clips: Folders of clips, or data sets of `tools/ingest.py`: one, or several that are mixed.
          latents: Folder or address (`gs://…`) of the cached latents; None for the run's own folder, or the one set
            before.
          checkpoints: Folder or address of the checkpoints of all models; None as above.

        Raises:
          UserError: If clips cannot be used or do not fit the config, or if other places for latents or
            checkpoints were set before.
        """
        if latents is not None:
            self.link_latents(latents)
        if self.remote is not None and checkpoints is None and not (self.folder / "checkpoints").exists():
            checkpoints = self.remote.address / "checkpoints"
        if checkpoints is not None:
            self.link_checkpoints(checkpoints)
        self.take(*clips)
        self.runtime.clips.select(self.experiment.data.held_out)  # raises for an unknown name
        for stage in self.stages:
            stage.check(self.runtime)

    def take(self, *clips: StoragePathLike) -> None:
        """Ingest folders of clips, and link to data sets that are ingested already; see `link_datasets`."""
        home = None if self.remote is None else self.remote.address / "data"
        with self.runtime.main_process_first():
            datasets.link_datasets(self.folder / "data", clips, weights=self.experiment.data.weights, home=home)

    def run_stages(self, last: str | None = None) -> None:
        """Run the stages that are not done yet.

        Args:
          last: Name of the last stage to run; None for all.

        Raises:
          UserError: If a stage cannot be run, or if no stage has that name.
          KeyboardInterrupt: After a signal, once the state is saved.
        """
        names = [stage.name for stage in self.stages]
        if last is not None and last not in names:
            raise UserError(f"stage={last!r} is invalid: the run has no such stage. Use one of {', '.join(names)}.")
        for stage in self.stages if last is None else self.stages[: names.index(last) + 1]:
            if stage.is_due(self.runtime):
                with self.runtime.recorder.phase(f"{goodput.STAGE}{stage.name}"):
                    stage.run(self.runtime)


@dataclass(frozen=True, kw_only=True)
class Run(StagedRun):
    """A run from clips to a pipeline: clips -> data set -> autoencoder -> latents -> denoiser -> pipeline."""

    experiment: Experiment
    experiment_class = Experiment

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:
        """Return the stages in order: the autoencoder's, other packages', the denoiser's."""
        experiment, start_step = self.experiment, 0
        stages: list[Stage] = [TrainAutoencoder(experiment=experiment), *experiment.stages]
        for index, name in enumerate([*(stage.name for stage in experiment.curriculum), ""]):
            own, latents = experiment.get_stage(index), None
            if own.data.cache_latents:
                title = f"{name}/latents" if name else "latents"
                latents = CacheLatents(name=title, experiment=own, curriculum=name, start_step=start_step)
                stages.append(latents)
            title = name or "denoiser"
            stages.append(
                TrainDenoiser(name=title, experiment=own, curriculum=name, start_step=start_step, latents=latents)
            )
            start_step += own.denoiser.steps
        return tuple(stages)

    def train(self, *clips: StoragePathLike, latents: _Location = None, checkpoints: _Location = None) -> Pipeline:
        """Run all stages, from clips to the finished pipeline; arguments are as for `prepare`.

        Raises:
          UserError: If clips cannot be used or do not fit the config, or if other places for latents or
            checkpoints were set before.
          KeyboardInterrupt: After a signal, once the state is saved.
        """
        self.prepare(*clips, latents=latents, checkpoints=checkpoints)
        self.run_stages()
        return self.load_pipeline()

    def prepare(self, *clips: StoragePathLike, latents: _Location = None, checkpoints: _Location = None) -> None:
        super().prepare(*clips, latents=latents, checkpoints=checkpoints)
        for stage in self.stages:
            if isinstance(stage, CacheLatents):
                stage.link_destination(self.runtime)
        if self.runtime.process == 0:
            if not (self.folder / PIPELINE_CONFIG).is_file():
                write_pipeline_config(self.folder, self.pipeline_config())
            self._update_finished_pipeline()

    def _update_finished_pipeline(self) -> None:
        """Update the finished pipeline's config, if there is one, with amended fields that need no other weights."""
        folder, experiment = self.folder / "pipeline", self.experiment
        if not (folder / PIPELINE_CONFIG).is_file():
            return
        config = read_pipeline_config(folder)
        amended = replace(
            config,
            backbone=experiment.denoiser.backbone,
            sampling=experiment.sampling,
            conditioner=experiment.denoiser.conditioner,
            evaluation=experiment.evaluation,
        )
        if amended != config:
            write_pipeline_config(folder, amended)

    def load_pipeline(self) -> Pipeline:
        """Return the finished pipeline, on the run's devices; all its processes call this.

        Raises:
          MissingError: If the run is not finished.
        """
        with self.runtime.main_process_first():  # which writes it
            pass
        return load_pipeline(
            self.folder / "pipeline", get_lora_modules=get_lora_modules, mesh=self.runtime.sampling_mesh
        )

    def newest_pipeline(
        self,
        *,
        step: int | None = None,
        ema: float | int | None = None,
        sigma_rel: float | None = None,
        mesh: MeshConfig | Mesh | None = None,
        offload: Offload | Literal["auto"] | None = "auto",
    ) -> Pipeline:
        """Return the pipeline of a checkpoint. The run may be unfinished, and its clips need not be present.

        Args:
          step: Step of the checkpoint, see `list_checkpoints`; None for the newest that can be read.
          ema: Decay of the average, 0 for the weights themselves; the config's `ema_decay` if None.
          sigma_rel: Relative width of an average that is reconstructed from snapshots.
          mesh: Devices that sample together, to which the weights are read; None for the default one.
          offload: Weights in host memory; see `dit_video.load`.

        Raises:
          MissingError: If the run has no checkpoint of this step, no snapshots, or no trained autoencoder.
          UserError: If the denoiser has no checkpoint yet, the average was not kept, or `ema` and `sigma_rel` are both
            given.
        """
        config, folder = self.experiment.denoiser, self.folder / "denoiser"
        sampling_mesh = make_mesh(MeshConfig(), jax.local_devices()[:1]) if mesh is None else resolve_mesh(mesh)[0]
        if (checkpoints := self.runtime.open_checkpoints("denoiser")).latest() is None:
            raise UserError(f"{self.folder} has no checkpoint of its denoiser yet; continue it with: {self.command}")
        trained = open_trainable_denoiser(config, folder, sampling_mesh, is_resuming=True)
        loss = make_denoiser_loss(self.experiment, sampling_mesh, empty_caption=np.zeros(1, np.int32))
        train_step = make_denoiser_step(config, loss)  # all stages share one state
        make_state_shardings = functools.partial(make_shardings, mesh=sampling_mesh)
        shapes = get_shapes_on_devices(lambda key: train_step.init(trained.init(key)), shardings=make_state_shardings)
        state, _ = checkpoints.restore(shapes, step)
        chosen = monitors.select_average(state, config, folder, ema=ema, sigma_rel=sigma_rel)
        del state
        params = trained.merge_params(chosen)
        return export.make_pipeline(self.experiment, self.runtime, params, mesh=mesh, offload=offload)

    def pipeline_config(self) -> PipelineConfig:
        """Return the config of this run's pipeline, which `prepare` has written, or which follows from the clips."""
        return export.get_pipeline_config(self.experiment, self.runtime)

    def codec(self) -> LatentCodec:
        """Return the trained autoencoder.

        Raises:
          MissingError: If the autoencoder is not trained yet.
        """
        config = self.experiment.autoencoder
        return LatentCodec(config.model, read_autoencoder(config, self.folder, command=self.command))

    def encoding(self) -> Encoding:
        """Return the encoding of this run's clips.

        Raises:
          MissingError: If the autoencoder is not trained yet.
        """
        return CacheLatents(name="latents", experiment=self.experiment).make_encoding(self.runtime)

    def open_latents(self) -> LatentSource:
        """Return the cached latents of the last stage.

        Raises:
          MissingError: If the latents are not encoded yet.
          UserError: If the latents are of other clips or of another autoencoder.
        """
        return CacheLatents(name="latents", experiment=self.experiment).open(self.runtime)

    def evaluation_clips(self) -> EvaluationClips:
        """Return the clips on which the trained models are evaluated."""
        runtime, limits = self.runtime, self.experiment.limits
        return EvaluationClips(runtime.training_clips, runtime.held_out_clips, limits, self.linear_baseline)

    def linear_baseline(self) -> LinearAutoencoder | None:
        """Return the best linear autoencoder with as many latent values, if any, as a baseline."""
        return TrainAutoencoder(experiment=self.experiment).fit_linear_baseline(self.runtime)
