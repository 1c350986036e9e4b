"""Training run: clips -> data set -> autoencoder -> latents -> denoiser -> pipeline, in one folder.

Every stage leaves its result in the folder, complete or not at all, and is not repeated; both trainings continue from
their checkpoints. An interrupted run is therefore continued by the same command. `run_folder` lists the files.
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from dit_video.autoencoders import LinearAutoencoder
from dit_video.core.errors import UserError
from dit_video.core.files import write_json
from dit_video.core.storage import StoragePathLike
from dit_video.data.latents.cache import INDEX as LATENTS
from dit_video.data.latents.cache import LatentSource
from dit_video.data.latents.offline import (
    Encoding,
    compute_latent_identity,
    encode_latents,
    finish_latents,
    make_encoding,
    plan_encoding,
)
from dit_video.data.loader import DenoiserBatches
from dit_video.data.sizes import fit_size
from dit_video.distributed import count_row_shards, make_mesh
from dit_video.encoders.autoencoder import LatentCodec
from dit_video.encoders.image import IDENTITY_FILE, open_image_encoder
from dit_video.encoders.text import FrozenTextEncoder, check_width, open_tokenizer
from dit_video.experiment import datasets, export, input_pipeline, monitors, trainers
from dit_video.experiment.folder import RunFolder
from dit_video.experiment.initialization import (
    TrainableDenoiser,
    add_other_expert,
    check_image_encoder,
    check_initial_weights,
    get_expert_names,
    get_optimizer_config,
    make_denoiser_loss,
    open_trainable_denoiser,
)
from dit_video.experiment.trainers import AutoencoderStage
from dit_video.families import get_lora_modules
from dit_video.pipelines.folder import CONFIG as PIPELINE_CONFIG
from dit_video.pipelines.folder import read_pipeline_config, write_pipeline_config
from dit_video.pipelines.pipeline import Pipeline, PipelineConfig
from dit_video.text import FrozenTextConfig, Tokenizer
from dit_video.training.checkpoint import Checkpoints
from dit_video.training.hooks.logging import Progress, print_on_first_process
from dit_video.training.losses.distillation import make_distillation_loss
from dit_video.training.optim.optimizer import make_optimizer
from dit_video.training.state import get_state_shapes, to_host
from dit_video.training.step import Loss, OwnStep

_Location = StoragePathLike | None


@dataclass(frozen=True, kw_only=True)
class Run(RunFolder):
    """A training run in its folder, made by `create` or `open`."""

    profile: tuple[int, int] | None = None
    """First and last step that are traced."""
    stage: str = ""
    """Name of the earlier denoiser stage that this run stands for."""
    begin: int = 0
    """Number of steps of the stages before this one."""

    def train(self, *clips: StoragePathLike, latents: _Location = None, checkpoints: _Location = None) -> Pipeline:
        """Train everything, from clips to the finished pipeline.

        Args:
          clips: folders of clips, or data sets of `tools/ingest.py`: one, or several that are mixed.
          latents: folder or address (`gs://…`) of the cached latents; None for the run's own folder, or the one set
            before.
          checkpoints: folder or address of the checkpoints of both models; None as above.

        Raises:
          UserError: clips that cannot be used or do not fit the config; other latents or checkpoints than before.
          KeyboardInterrupt: after a signal, once the state is saved.
        """
        self.prepare(*clips, latents=latents, checkpoints=checkpoints)
        return self.export()

    def prepare(self, *clips: StoragePathLike, latents: _Location = None, checkpoints: _Location = None) -> None:
        """Link the clips, and check everything that can be checked before training; arguments are as for `train`.

        Raises:
          UserError: clips that cannot be used or do not fit the config; other latents or checkpoints than before.
        """
        if latents is not None:
            self.link_latents(latents)
        if checkpoints is not None:
            self.link_checkpoints(checkpoints)
        self.take(*clips)
        self.clips.select(self.experiment.data.held_out)  # raises for an unknown name
        for stage in (*self.earlier, self):  # checks later stages before hours are spent on earlier ones
            for info in self.clips.infos:
                fit_size(info, stage.experiment.limits)
            input_pipeline.check_inputs(stage.experiment, self.training_clips)
        check_initial_weights(self.experiment.denoiser)
        if isinstance(text := self.experiment.denoiser.text, FrozenTextConfig) and not self._text_encoder.is_file():
            check_width(text)  # only until the identity is recorded: then the run continues without the folder
        check_image_encoder(self.experiment.denoiser, self.folder / IDENTITY_FILE)
        if not (self.folder / PIPELINE_CONFIG).is_file() and jax.process_index() == 0:
            write_pipeline_config(self.folder, self.pipeline_config())

    def take(self, *clips: StoragePathLike) -> None:
        """Ingest folders of clips, and link to data sets that are ingested already; see `link_datasets`."""
        datasets.link_datasets(self.folder / "data", clips, weights=self.experiment.data.weights)

    @property
    def _own(self) -> Path:
        """Return the folder of this stage's own files."""
        return self.folder / "stages" / self.stage if self.stage else self.folder

    @property
    def autoencoder(self) -> AutoencoderStage:
        """Return the run's autoencoder, which may not be trained yet."""
        return AutoencoderStage(
            experiment=self.experiment,
            folder=self.folder / "autoencoder",
            checkpoints=self.get_checkpoint_folder("autoencoder"),
            clips=lambda: self.training_clips,
            command=self.command,
            profile=self.profile,
        )

    def train_autoencoder(self) -> dict[str, Any]:
        """Train the autoencoder if it is not trained yet, and return its parameters; see `AutoencoderStage.train`."""
        return self.autoencoder.train()

    def encode_latents(self) -> LatentSource:
        """Encode what of the training clips is not encoded yet, and return their latents.

        The autoencoder is trained before if it is not trained yet.
        """
        if not self.autoencoder.is_trained:
            self.train_autoencoder()
        encoding, clips = self.encoding(), self.training_clips
        identity = compute_latent_identity(encoding, clips)
        destination = datasets.resolve(self._own / "latents")
        if not (destination / LATENTS).is_file():
            plan = plan_encoding(clips, encoding)
            with Progress("encoding latents", len(plan.views), unit="clip") as progress:
                part: dict[str, Any] = {"shard": jax.process_index(), "shards": jax.process_count()}
                part |= {"identity": identity, "progress": progress.update}
                finished = encode_latents(destination, clips, encoding, plan, **part)
            while not finished:  # other processes are still writing their files
                time.sleep(1)
                finished = finish_latents(destination, encoding, plan, identity=identity)
        source = LatentSource(destination, identity=identity)
        if source.skipped:
            name, reason = source.skipped[0]
            count = len(source.skipped)
            print_on_first_process(f"{count} clips could not be encoded and are skipped, such as {name}: {reason}")
        return source

    def encoding(self) -> Encoding:
        """Return the encoding of this run's clips.

        Raises:
          MissingError: the autoencoder is not trained yet.
        """
        config, images = self.experiment.denoiser, None
        if config.image_encoder is not None:
            images = open_image_encoder(config.image_encoder, identity_file=self.folder / IDENTITY_FILE)
        return make_encoding(self.experiment, self.autoencoder.read(), text=self._tokenizer(), images=images)

    @property
    def earlier(self) -> tuple["Run", ...]:
        """Return the denoiser's stages before the last, which is the run itself, each as a run of the same folder."""
        begin, views = 0, []
        for number, stage in enumerate(self.experiment.earlier):
            experiment = self.experiment.get_stage(number)
            views.append(dataclasses.replace(self, experiment=experiment, stage=stage.name, begin=begin))
            begin += stage.steps
        return tuple(views)

    def train_denoiser(self) -> dict[str, Any]:
        """Train the denoiser, and before it the autoencoder, as far as they are not trained yet.

        Earlier stages are trained first; nothing is read of a finished one.

        Returns:
          The averaged parameters of the denoiser and text encoder: `{"dit": ..., "text": ...}`.
        """
        checkpoints = self._checkpoints
        if not self.autoencoder.is_trained:
            self.train_autoencoder()
        for stage in self.earlier:
            if (checkpoints.latest() or 0) < (end := stage.begin + stage.experiment.denoiser.steps):
                print_on_first_process(f"stage {stage.stage}: up to step {end}")
                stage._train_stage()
        state, trained = self._train_stage()
        ema_params = to_host(state.ema)
        del state
        config = self.experiment.denoiser
        expert, _ = get_expert_names(config)
        if (adapter := trained.get_adapter(ema_params)) is None:
            export.save_transformer(self.folder, config.dit, ema_params, expert=expert)
        else:
            export.save_adapter(self.folder, config.dit, adapter, trained.base_params or {}, expert=expert)
        return trained.merge_params(ema_params)

    def _train_stage(self) -> tuple[Any, TrainableDenoiser]:
        """Return the state after this stage of the denoiser, and what was trained."""
        config, experiment = self.experiment.denoiser, self.experiment
        if experiment.data.cache_latents:
            latents = self.encode_latents()
            texts = input_pipeline.open_captions(self._tokenizer(), latents.all_captions, cached=latents)
            rows = input_pipeline.make_cached_batches(experiment, latents, self.training_clips, texts)
        else:
            captions = [info.captions for info in self.training_clips.infos]
            texts = input_pipeline.open_captions(self._tokenizer(cache=self.folder / "texts"), captions)
            encode = input_pipeline.make_online_encoder(experiment, self.autoencoder.read(), self.training_clips)
            rows = input_pipeline.make_online_batches(experiment, self.training_clips, texts, encode)
        base = make_denoiser_loss(experiment, make_mesh(experiment.mesh), empty_caption=texts.empty)
        distillation = config.distillation
        loss: Loss | OwnStep = base if distillation is None else make_distillation_loss(distillation, base)

        def batches(start: int) -> DenoiserBatches:
            row_batches = rows(start)
            self._note_rows(row_batches)
            return row_batches

        trained = self._trained_denoiser()
        folder = self.folder / "denoiser"
        evaluators = monitors.Watched(
            experiment=experiment,
            folder=folder,
            loss=base,
            trained=trained,
            clips=self.training_clips,
            held_out=lambda: self.held_out_clips,
            tokenizer=lambda: self._tokenizer(cache=self.folder / "texts"),
            autoencoder=self.autoencoder.read,
            pipeline=self._pipeline,
        )
        options = trained.make_training_arguments() | evaluators.arguments()
        options["begin"] = self.begin or sum(stage.steps for stage in experiment.earlier)
        options |= {"profile": self.profile, "checkpoints": self.get_checkpoint_folder("denoiser")}
        return trainers.train(experiment, folder, trained.init, trained.wrap_loss(loss), batches, **options), trained

    def _pipeline(self, denoiser: dict[str, Any]) -> Pipeline:
        """Return the pipeline with these denoiser weights."""
        denoiser = add_other_expert(self.experiment.denoiser, denoiser)
        parameters = {"autoencoder": self.autoencoder.read(), "denoiser": denoiser}
        return Pipeline(self.pipeline_config(), **parameters, get_lora_modules=get_lora_modules)

    def _tokenizer(self, *, cache: Path | None = None) -> Tokenizer | FrozenTextEncoder:
        """Return the text encoder. The identity of a frozen one is recorded, to be known without its weights."""
        return open_tokenizer(self.experiment.denoiser.text, identity_file=self._text_encoder, cache=cache)

    @property
    def _text_encoder(self) -> Path:
        return self.folder / "text_encoder.json"

    def _note_rows(self, batches: DenoiserBatches) -> None:
        """Write `denoiser/rows.json`, and log what an epoch holds."""
        summary = batches.summarize(devices=count_row_shards(make_mesh(self.experiment.mesh)))
        if jax.process_index() == 0:
            write_json((self._own if self.stage else self.folder / "denoiser") / "rows.json", summary)
        imbalance = summary.get("imbalance")
        lost = f", {imbalance['mean']:.1%} of the time lost by unequal devices" if imbalance else ""
        print_on_first_process(f"{batches}{lost}")

    def export(self) -> Pipeline:
        """Write `pipeline/`, after training what is not trained yet: the autoencoder, on its latents the denoiser."""
        pipeline = self._pipeline(self.train_denoiser())
        if not (self.folder / "pipeline").is_dir() and jax.process_index() == 0:
            pipeline.save(self.folder / "pipeline")
        return pipeline

    def newest_pipeline(self, *, ema: float | int | None = None, sigma_rel: float | None = None) -> Pipeline:
        """Return the pipeline of the newest checkpoint of a run that may be unfinished. Its clips are not needed.

        Args:
          ema: decay of the average, 0 for the weights themselves; the config's `ema_decay` if None.
          sigma_rel: relative width of an average that is reconstructed from snapshots.

        Raises:
          MissingError: there are no snapshots, or the autoencoder is not trained yet.
          UserError: the denoiser has no checkpoint yet, or kept no such average.
        """
        config = self.experiment.denoiser
        if (checkpoints := self._checkpoints).latest() is None:
            raise UserError(f"{self.folder} has no checkpoint of its denoiser yet; continue it with: {self.command}")
        trained = self._trained_denoiser()
        optimizer = make_optimizer(get_optimizer_config(config), steps=config.steps)  # all stages share one state
        shapes = get_state_shapes(trained.init, optimizer, averages=config.averages)
        if (distillation := config.distillation) is not None:
            shapes = jax.eval_shape(lambda state: distillation.init_state(state, optimizer), shapes)
        state, _ = checkpoints.restore(shapes)
        chosen = monitors.select_average(state, config, self.folder / "denoiser", ema=ema, sigma_rel=sigma_rel)
        return self._pipeline(trained.merge_params(chosen))

    def pipeline_config(self) -> PipelineConfig:
        """Return the config of this run's pipeline, which `prepare` has written, or which follows from the clips."""
        if (self.folder / PIPELINE_CONFIG).is_file():
            return read_pipeline_config(self.folder)
        infos, text = self.training_clips.infos, self._tokenizer()
        return export.make_pipeline_config(self.experiment, infos, text, command=self.command)

    @property
    def _checkpoints(self) -> Checkpoints:
        """Return the checkpoints of the denoiser."""
        return Checkpoints(self.get_checkpoint_folder("denoiser"))

    def _trained_denoiser(self) -> TrainableDenoiser:
        folder = self.folder / "denoiser"
        continues = self._checkpoints.latest() is not None
        mesh = make_mesh(self.experiment.mesh)
        return open_trainable_denoiser(self.experiment.denoiser, folder, mesh, is_resuming=continues)

    def codec(self) -> LatentCodec:
        """Return the trained autoencoder.

        Raises:
          MissingError: it is not trained yet.
        """
        return LatentCodec(self.experiment.autoencoder.model, self.autoencoder.read())

    def linear_baseline(self) -> LinearAutoencoder | None:
        """Return the best linear autoencoder with as many latent values, if any, as a baseline."""
        return self.autoencoder.fit_linear_baseline()
