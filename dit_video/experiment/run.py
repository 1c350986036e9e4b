"""A training run, composed: clips -> data set -> autoencoder -> latents -> denoiser -> pipeline, in one folder.

Every stage leaves its result in the folder, whole or not at all, and is not done again; the two trainings continue
from their checkpoints. So a run that was interrupted is continued by running the same again. `run_folder` lists what
lies in the folder.
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
from dit_video.core.storage import Address
from dit_video.data.latents.cache import INDEX as LATENTS
from dit_video.data.latents.cache import LatentSource
from dit_video.data.latents.offline import (
    Encoding,
    encode_latents,
    encoding_of,
    finish_latents,
    latent_identity,
    plan_encoding,
)
from dit_video.data.loader import Batches
from dit_video.data.sizes import fit
from dit_video.distributed import make_mesh, row_shards
from dit_video.encoders.autoencoder import Codec
from dit_video.encoders.image import IMAGE_ENCODER, open_image_encoder
from dit_video.encoders.text import FrozenEncoder, check_width, open_tokenizer
from dit_video.experiment import datasets, export, input_pipeline, monitors, trainers
from dit_video.experiment.folder import RunFolder
from dit_video.experiment.initialization import (
    TrainedDenoiser,
    check_image_encoder,
    check_start,
    denoiser_loss,
    experts_of,
    optimizer_of,
    trained_denoiser,
    with_other,
)
from dit_video.experiment.trainers import AutoencoderStage
from dit_video.pipelines.pipeline import Pipeline, PipelineConfig
from dit_video.text import FrozenTextConfig, Tokenizer
from dit_video.training.checkpoint import Checkpoints
from dit_video.training.hooks.logging import Progress, remark
from dit_video.training.losses.distillation import distillation_loss
from dit_video.training.optim.optimizer import make_optimizer
from dit_video.training.state import on_host, state_shapes
from dit_video.training.step import Loss, OwnStep


@dataclass(frozen=True, kw_only=True)
class Run(RunFolder):
    """One run in its folder. `create` or `open` makes it."""

    profile: tuple[int, int] | None = None
    """the first and the last step that are traced"""
    stage: str = ""
    """which of the denoiser's earlier stages this is"""
    begin: int = 0
    """steps of the stages before it"""

    def train(self, *clips: Address, latents: Address | None = None, checkpoints: Address | None = None) -> Pipeline:
        """Everything from clips to the finished pipeline.

        Args:
          clips: folders of clips, or data sets that `tools/ingest.py` made: one, or several that are mixed.
          latents: where the cached latents are, or are to be written: a folder or an address (`gs://…`); if None the
            run's own folder, or what it was given before.
          checkpoints: the same of those of both models.

        Raises:
          UserError: clips that can't be used, or that do not fit the config; other latents or checkpoints than before.
          KeyboardInterrupt: after a signal, the state being saved.
        """
        self.prepare(*clips, latents=latents, checkpoints=checkpoints)
        return self.export()

    def prepare(self, *clips: Address, latents: Address | None = None, checkpoints: Address | None = None) -> None:
        """Take the clips, and refuse what would fail later, before anything is trained; arguments are as for `train`.

        Raises:
          UserError: clips that can't be used, or that do not fit the config; other latents or checkpoints than before.
        """
        if latents is not None:
            self.keep_latents(latents)
        if checkpoints is not None:
            self.keep_checkpoints(checkpoints)
        self.take(*clips)
        self.clips.select(self.experiment.data.held_out)  # a name that isn't there, before anything is trained
        for stage in (*self.earlier, self):  # before hours are spent on the others
            for info in self.clips.infos:
                fit(info, stage.experiment.limits)
            input_pipeline.check(stage.experiment, self.training_clips)
        check_start(self.experiment.denoiser)
        if isinstance(text := self.experiment.denoiser.text, FrozenTextConfig) and not self._text_encoder.is_file():
            check_width(text)  # as early; once the encoder is known the run goes on without its folder
        check_image_encoder(self.experiment.denoiser, self.folder / IMAGE_ENCODER)

    def take(self, *clips: Address) -> None:
        """Ingest folders of clips, and link to data sets that are ingested already; see `intake.take`."""
        datasets.take(self.folder / "data", clips, weights=self.experiment.data.weights)

    @property
    def _own(self) -> Path:
        """Where that lies which another stage has too."""
        return self.folder / "stages" / self.stage if self.stage else self.folder

    @property
    def autoencoder(self) -> AutoencoderStage:
        """Its autoencoder: trained if it isn't yet, or given."""
        return AutoencoderStage(
            experiment=self.experiment,
            folder=self.folder / "autoencoder",
            checkpoints=self.checkpoints_of("autoencoder"),
            clips=lambda: self.training_clips,
            profile=self.profile,
        )

    def train_autoencoder(self) -> dict[str, Any]:
        """The parameters of the autoencoder, trained if it isn't yet; see `AutoencoderStage.params`."""
        return self.autoencoder.params()

    def encode_latents(self) -> LatentSource:
        """The cached latents of the training clips. Files that `tools/encode_latents.py` made are not made again."""
        encoding, clips = self.encoding(), self.training_clips
        stamp = latent_identity(encoding, clips)
        destination = datasets.lies(self._own / "latents")
        if not (destination / LATENTS).is_file():
            plan = plan_encoding(clips, encoding)
            with Progress("encoding latents", len(plan.views), unit="clip") as progress:
                finished = encode_latents(
                    destination,
                    clips,
                    encoding,
                    plan,
                    identity=stamp,
                    shard=jax.process_index(),
                    shards=jax.process_count(),
                    progress=progress.update,
                )
            while not finished:  # the other processes have not made all of their files yet
                time.sleep(1)
                finished = finish_latents(destination, encoding, plan, identity=stamp)
        source = LatentSource(destination, identity=stamp)
        if source.left_out:
            name, reason = source.left_out[0]
            remark(f"{len(source.left_out)} clips could not be encoded and are left out, such as {name}: {reason}")
        return source

    def encoding(self) -> Encoding:
        """What turns clips into this run's latents, after training the autoencoder if that isn't trained yet."""
        config, images = self.experiment.denoiser, None
        if config.image_encoder is not None:
            images = open_image_encoder(config.image_encoder, kept=self.folder / IMAGE_ENCODER)
        return encoding_of(self.experiment, self.train_autoencoder(), text=self._tokenizer(), images=images)

    @property
    def earlier(self) -> tuple["Run", ...]:
        """The stages of the denoiser before the last, which is the run itself, each as a run of the same folder."""
        begin, views = 0, []
        for number, stage in enumerate(self.experiment.earlier):
            views.append(
                dataclasses.replace(self, experiment=self.experiment.stage(number), stage=stage.name, begin=begin)
            )
            begin += stage.steps
        return tuple(views)

    def train_denoiser(self) -> dict[str, Any]:
        """The averaged parameters of the trained denoiser and text encoder: `{"dit": ..., "text": ...}`.

        Earlier stages are trained before; of one that is done nothing is read again.
        """
        checkpoints = self._checkpoints
        if self.earlier:
            self.train_autoencoder()
        for stage in self.earlier:
            if (checkpoints.latest() or 0) < stage.begin + stage.experiment.denoiser.steps:
                remark(f"stage {stage.stage}: up to step {stage.begin + stage.experiment.denoiser.steps}")
                stage._train_stage()
        state, trained = self._train_stage()
        averaged = on_host(state.ema)
        del state
        config = self.experiment.denoiser
        expert, _ = experts_of(config)
        if (adapter := trained.adapter(averaged)) is None:
            export.save_transformer(self.folder, config.dit, averaged, expert=expert)
        else:
            export.save_adapter(self.folder, config.dit, adapter, trained.adapted or {}, expert=expert)
        return trained.whole(averaged)

    def _train_stage(self) -> tuple[Any, TrainedDenoiser]:
        """The state after this stage of the denoiser, and what was trained."""
        config, experiment = self.experiment.denoiser, self.experiment
        if experiment.data.cache_latents:
            latents = self.encode_latents()
            texts = input_pipeline.texts_of(self._tokenizer(), latents.all_captions, cached=latents)
            rows = input_pipeline.cached_rows(experiment, latents, self.training_clips, texts)
        else:
            captions = [info.captions for info in self.training_clips.infos]
            texts = input_pipeline.texts_of(self._tokenizer(cache=self.folder / "texts"), captions)
            encode = input_pipeline.live_encoder(experiment, self.train_autoencoder(), self.training_clips)
            rows = input_pipeline.live(experiment, self.training_clips, texts, encode)
        base = denoiser_loss(experiment, make_mesh(experiment.mesh), empty=texts.empty)
        distillation = config.distillation
        loss: Loss | OwnStep = base if distillation is None else distillation_loss(distillation, base)

        def batches(start: int) -> Batches:
            opened = rows(start)
            self._note_rows(opened)
            return opened

        trained = self._trained_denoiser()
        folder = self.folder / "denoiser"
        watched = monitors.Watched(
            experiment=experiment,
            folder=folder,
            loss=base,
            trained=trained,
            clips=self.training_clips,
            held_out=lambda: self.held_out_clips,
            tokenizer=lambda: self._tokenizer(cache=self.folder / "texts"),
            autoencoder=self.train_autoencoder,
            pipeline=self._pipeline,
        )
        begin = self.begin or sum(stage.steps for stage in experiment.earlier)
        given = {**trained.arguments(), **watched.arguments(), "begin": begin, "profile": self.profile}
        given["checkpoints"] = self.checkpoints_of("denoiser")
        return trainers.train(experiment, folder, trained.init, trained.loss(loss), batches, **given), trained

    def _pipeline(self, denoiser: dict[str, Any]) -> Pipeline:
        """Of the trained denoiser's weights."""
        denoiser = with_other(self.experiment.denoiser, denoiser)
        return Pipeline(self.pipeline_config(), autoencoder=self.train_autoencoder(), denoiser=denoiser)

    def _tokenizer(self, *, cache: Path | None = None) -> Tokenizer | FrozenEncoder:
        """Of the text encoder. The identity of a frozen one is kept, to know it without its weights."""
        return open_tokenizer(self.experiment.denoiser.text, kept=self._text_encoder, cache=cache)

    @property
    def _text_encoder(self) -> Path:
        return self.folder / "text_encoder.json"

    def _note_rows(self, batches: Batches) -> None:
        """Write `denoiser/rows.json`, and say what an epoch holds."""
        summary = batches.summary(devices=row_shards(make_mesh(self.experiment.mesh)))
        if jax.process_index() == 0:
            write_json((self._own if self.stage else self.folder / "denoiser") / "rows.json", summary)
        unequal = summary.get("imbalance")
        remark(str(batches) + (f", {unequal['mean']:.1%} of the time lost by unequal devices" if unequal else ""))

    def export(self) -> Pipeline:
        """Write `pipeline/`, after training what is not trained yet: the autoencoder, on its latents the denoiser."""
        pipeline = self._pipeline(self.train_denoiser())
        if not (self.folder / "pipeline").is_dir() and jax.process_index() == 0:
            pipeline.save(self.folder / "pipeline")
        return pipeline

    def newest_pipeline(self, *, ema: float | int | None = None, sigma_rel: float | None = None) -> Pipeline:
        """The pipeline of the newest checkpoint of a run that need not be finished.

        Args:
          ema: of which average: by its decay, 0 for the weights themselves; that of the config's `ema_decay` if None.
          sigma_rel: the relative width of an average that is put together from snapshots.

        Raises:
          MissingError: there are no snapshots.
          UserError: the denoiser has no checkpoint yet, or kept no such average.
        """
        config = self.experiment.denoiser
        if (checkpoints := self._checkpoints).latest() is None:
            raise UserError(f"{self.folder} has no checkpoint of its denoiser yet; continue it with: {self.command}")
        trained = self._trained_denoiser()
        optimizer = make_optimizer(optimizer_of(config), steps=config.steps)  # any stage's: they have one state
        shapes = state_shapes(trained.init, optimizer, averages=config.averages)
        if (distillation := config.distillation) is not None:
            shapes = jax.eval_shape(lambda state: distillation.begin(state, optimizer), shapes)
        state, _ = checkpoints.restore(shapes)
        chosen = monitors.averaged(state, config, self.folder / "denoiser", ema=ema, sigma_rel=sigma_rel)
        return self._pipeline(trained.whole(chosen))

    def pipeline_config(self) -> PipelineConfig:
        """What the pipeline of this run is made of."""
        return export.pipeline_config_of(
            self.experiment, self.training_clips.infos, self._tokenizer(), command=self.command
        )

    @property
    def _checkpoints(self) -> Checkpoints:
        """Of the denoiser."""
        return Checkpoints(self.checkpoints_of("denoiser"))

    def _trained_denoiser(self) -> TrainedDenoiser:
        folder = self.folder / "denoiser"
        continues = self._checkpoints.latest() is not None
        mesh = make_mesh(self.experiment.mesh)
        return trained_denoiser(self.experiment.denoiser, folder, mesh, continues=continues)

    def codec(self) -> Codec:
        """The autoencoder, trained if it isn't yet."""
        return Codec(self.experiment.autoencoder.model, self.train_autoencoder())

    def linear_baseline(self) -> LinearAutoencoder | None:
        """The best linear autoencoder of as many latent values: what ours has to beat, where there is one."""
        return self.autoencoder.linear_baseline()
