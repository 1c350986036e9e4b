"""The stage that trains the denoiser."""

from dataclasses import dataclass, replace
from typing import Any

from dit_video.core.errors import UserError
from dit_video.core.files import write_json
from dit_video.core.storage import StoragePath
from dit_video.data.captions import CaptionSource
from dit_video.data.rows import RowStream
from dit_video.data.sources import ClipExamples, LatentExamples
from dit_video.distributed import count_row_shards
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.evaluation.requests import EvaluationClips
from dit_video.experiment import export, input_pipeline, monitors
from dit_video.experiment.autoencoder import read_autoencoder
from dit_video.experiment.denoiser import (
    TrainableDenoiser,
    get_expert_names,
    make_denoiser_loss,
    make_denoiser_step,
    open_trainable_denoiser,
)
from dit_video.experiment.encoders import check_encoders, open_text_encoder
from dit_video.experiment.folder import EXCLUDED_FILE
from dit_video.experiment.initial_weights import check_initial_weights
from dit_video.experiment.monitors import EvaluationHook
from dit_video.experiment.runtime import Runtime, Training
from dit_video.experiment.self_check.hook import SelfCheck
from dit_video.experiment.self_check.subject import CheckedTraining
from dit_video.experiment.stages.autoencoder import TrainAutoencoder
from dit_video.experiment.stages.latents import CacheLatents, DenoiserStage
from dit_video.sampling.pipeline import Pipeline
from dit_video.training import goodput
from dit_video.training.hooks.hook import Hook
from dit_video.training.hooks.logging import print_on_first_process
from dit_video.training.losses.denoiser import DenoiserLoss
from dit_video.training.trainer import BatchIterator, Trainer


@dataclass(frozen=True, kw_only=True)
class TrainDenoiser(DenoiserStage):
    """Training of the denoiser on cached latents, or on clips that are encoded as they are read.

    The last stage leaves the pipeline.
    """

    latents: CacheLatents | None = None
    """Stage that has cached the latents; None to encode clips as they are read."""

    def list_inputs(self, runtime: Runtime) -> tuple[StoragePath, ...]:
        previous = self.latents or TrainAutoencoder(experiment=self.experiment)
        return previous.list_outputs(runtime)

    def list_outputs(self, runtime: Runtime) -> tuple[StoragePath, ...]:
        return () if self.curriculum else (runtime.folder / "pipeline",)

    def is_done(self, runtime: Runtime) -> bool:
        return self.is_trained(runtime)

    def check(self, runtime: Runtime) -> None:
        runtime = runtime.for_stage(self.experiment)
        self._record_excluded(runtime)
        input_pipeline.check_inputs(self.experiment, runtime.mesh, runtime.training_clips)
        check_initial_weights(self.experiment.denoiser)
        check_encoders(self.experiment, runtime)
        self._check_evaluation(runtime)

    def run(self, runtime: Runtime) -> None:
        runtime, config = runtime.for_stage(self.experiment), self.experiment.denoiser
        if self.curriculum:
            print_on_first_process(f"stage {self.curriculum}: up to step {self.end_step}")
        with runtime.recorder.phase(goodput.STARTUP):
            is_new = runtime.open_checkpoints("denoiser").latest() is None
            trainer, open_rows, loss, trained = self._open_training(runtime, is_new=is_new)
            trainer = replace(
                trainer,
                hooks=(*trainer.hooks, *self._make_hooks(runtime, loss, trained)),
                flops_fn=monitors.make_flops_fn(config),
            )
            check = self._make_self_check(runtime, trainer, loss, trained, is_new=is_new)
            if check is not None:
                trainer = replace(trainer, hooks=(*trainer.hooks, check))

            def open_and_record(start: int) -> BatchIterator:
                rows = open_rows(start)
                self._record_rows(runtime, rows)
                return rows if check is None else check.watch(rows, start)

            state = trainer.run(open_and_record)
        if not self.curriculum:
            ema_params = state.ema
            del state
            self._export(runtime, trained, ema_params)

    def open_training(self, runtime: Runtime, *, is_new: bool) -> Training:
        return Training(*self._open_training(runtime.for_stage(self.experiment), is_new=is_new)[:2])

    def _open_training(
        self, runtime: Runtime, *, is_new: bool
    ) -> tuple[Trainer, input_pipeline.OpenRows, DenoiserLoss, TrainableDenoiser]:
        """Return the trainer without logs, the function that opens the batches, the loss and what is trained."""
        captions, open_rows = self.open_inputs(runtime)
        loss = make_denoiser_loss(self.experiment, runtime.mesh, empty_caption=captions.empty)
        folder = runtime.folder / "denoiser"
        trained = open_trainable_denoiser(self.experiment.denoiser, folder, runtime.mesh, is_resuming=not is_new)
        return self.make_trainer(runtime, loss, trained), open_rows, loss, trained

    def make_trainer(self, runtime: Runtime, loss: DenoiserLoss, trained: TrainableDenoiser) -> Trainer:
        """Return the trainer of the denoiser, without logs."""
        config = self.experiment.denoiser
        trainer = runtime.make_trainer(
            "denoiser",
            steps=config.steps,
            init=trained.init,
            train_step=make_denoiser_step(config, loss, start_step=self.start_step, mesh=runtime.mesh),
            start_step=self.start_step,
        )
        return replace(
            trainer, load_params=trained.load_initial, frozen_params=trained.frozen_params, averages=config.averages
        )

    def open_inputs(self, runtime: Runtime) -> tuple[CaptionSource, input_pipeline.OpenRows]:
        """Return the captions, and what opens the rows from a step on."""
        experiment, clips = self.experiment, runtime.training_clips
        source: LatentExamples | ClipExamples
        if self.latents is not None:
            latents, text_encoder = self.latents.open(runtime), open_text_encoder(experiment, runtime)
            captions = input_pipeline.open_captions(text_encoder, clips, cached=latents)
            source = input_pipeline.make_latent_examples(experiment, latents, clips, captions)
        else:
            text_encoder = open_text_encoder(experiment, runtime, cache=runtime.folder / "texts")
            captions = input_pipeline.open_captions(text_encoder, clips)
            params = read_autoencoder(experiment.autoencoder, runtime.folder, command=runtime.command)
            encode = input_pipeline.make_online_encoder(experiment, runtime.mesh, params, clips)
            source = input_pipeline.make_clip_examples(experiment, clips, captions, encode)
        return captions, input_pipeline.open_rows(experiment, runtime.mesh, source, clips)

    def _make_hooks(self, runtime: Runtime, loss: DenoiserLoss, trained: TrainableDenoiser) -> tuple[Hook, ...]:
        """Return the logs, the validation and the samples that the config asks for."""
        experiment, monitoring, folder = self.experiment, self.experiment.monitoring, runtime.folder / "denoiser"
        hooks = monitors.open_logs(monitoring, folder)
        if monitoring.validate_every:
            text_encoder = open_text_encoder(experiment, runtime, cache=runtime.folder / "texts")
            params = read_autoencoder(experiment.autoencoder, runtime.folder, command=runtime.command)
            clips = runtime.held_out_clips
            hooks.append(monitors.make_validation(experiment, runtime.mesh, clips, text_encoder, params, loss, trained))

        def make_pipeline(ema_params: dict[str, Any]) -> Pipeline:
            params = trained.attach_params(ema_params)
            return export.make_pipeline(experiment, runtime, params, mesh=runtime.sampling_mesh)

        if monitoring.evaluate_every:
            evaluated = EvaluationClips(
                runtime.training_clips, runtime.held_out_clips, experiment.limits, linear=lambda: None
            )
            hooks.append(
                EvaluationHook(
                    folder / "evaluations",
                    every=monitoring.evaluate_every,
                    evaluation=experiment.evaluation,
                    clips=evaluated,
                    make_pipeline=make_pipeline,
                )
            )
        if monitoring.sample_every:
            captions = [info.captions[0] for info in runtime.training_clips.infos if info.captions]
            hooks.append(monitors.make_sampling(folder / "samples", monitoring, captions, make_pipeline))
        return tuple(hooks)

    def _make_self_check(
        self, runtime: Runtime, trainer: Trainer, loss: DenoiserLoss, trained: TrainableDenoiser, *, is_new: bool
    ) -> SelfCheck | None:
        """Return the hook that checks the training; None if the config asks for none."""
        if not self.experiment.monitoring.self_check:
            return None
        encoding = None if self.latents is None else self.latents.make_encoding(runtime)
        subject = CheckedTraining(
            experiment=self.experiment,
            trainer=trainer,
            loss=loss,
            trained=trained,
            clips=runtime.training_clips,
            held_out_clips=runtime.held_out_clips,
            text_encoder=open_text_encoder(self.experiment, runtime),
            latents=None if self.latents is None else self.latents.open(runtime, encoding=encoding),
            encoding=encoding,
        )
        return SelfCheck(subject, is_new=is_new)

    def _record_rows(self, runtime: Runtime, rows: RowStream) -> None:
        """Write `rows.json`, and log what an epoch holds."""
        summary = rows.summarize(devices=count_row_shards(runtime.mesh))
        if runtime.process == 0:
            folder = self.get_folder(runtime) if self.curriculum else runtime.folder / "denoiser"
            write_json(folder / "rows.json", summary)
        imbalance = summary.get("imbalance")
        lost = f", {imbalance['mean']:.1%} of the time lost by unequal devices" if imbalance else ""
        print_on_first_process(f"{rows}{lost}")

    def _record_excluded(self, runtime: Runtime) -> None:
        """Log the clips that cannot be used, and list all of them in a file, if there are any."""
        selections = {"training": runtime.usable_training_clips, "held_out": runtime.usable_held_out_clips}
        path = self.get_folder(runtime) / EXCLUDED_FILE
        excluded = {name: selected for name, selected in selections.items() if selected.excluded}
        for selected in excluded.values():
            print_on_first_process(f"{selected.describe()} (all are listed in {path})")
        if runtime.process:
            return
        path.unlink(missing_ok=True)  # of another config, before anything was trained
        if excluded:
            write_json(path, {name: one.to_json() for name, one in excluded.items()})

    def _check_evaluation(self, runtime: Runtime) -> None:
        """Check what the monitors, and the evaluation after the training, need besides the models.

        Raises:
          MissingError: If a logging package, or what a metric reads, is missing.
          UserError: If Weights & Biases is not logged in, if no clips are held out to validate on, or if there is no
            caption to sample during the training.
        """
        monitoring, evaluation = self.experiment.monitoring, self.experiment.evaluation
        if not self.is_trained(runtime):
            monitors.open_logs(monitoring, runtime.folder / "denoiser")
        if runtime.process == 0:
            for metric in evaluation.metrics:
                metric.open_weights()
        if monitoring.validate_every and not len(runtime.held_out_clips):
            raise UserError(
                f"monitoring.validate_every={monitoring.validate_every} is invalid: no clips are held out to validate "
                "on. Name some in data.held_out, or leave it out."
            )
        if any(info.captions for clips in (runtime.training_clips, runtime.held_out_clips) for info in clips.infos):
            return
        samples_captions = isinstance(evaluation, CaptionEvaluation)
        if samples_captions and monitoring.evaluate_every:
            raise UserError(
                f"monitoring.evaluate_every={monitoring.evaluate_every} is invalid: no clip has a caption to sample. "
                "Give clips captions, or leave it out."
            )
        if not self.curriculum:
            consequence = ", and the report has no samples" if samples_captions else ""
            print_on_first_process(f"no clip has a caption: the denoiser is trained without text{consequence}")

    def _export(self, runtime: Runtime, trained: TrainableDenoiser, ema_params: dict[str, Any]) -> None:
        """Write the averaged weights: under the names of other projects, and as a pipeline."""
        folder, config = runtime.folder, self.experiment.denoiser
        expert, _ = get_expert_names(config)
        if (adapter := trained.get_adapter(ema_params)) is None:
            export.save_transformer(folder, config.backbone, ema_params, expert=expert)
        else:
            export.save_adapter(folder, config.backbone, adapter, trained.base_params or {}, expert=expert)
        params, mesh = trained.merge_params(ema_params), runtime.sampling_mesh
        export.make_pipeline(self.experiment, runtime, params, mesh=mesh).save(folder / "pipeline")
