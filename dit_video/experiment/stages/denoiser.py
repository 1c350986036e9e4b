"""The stage that trains the denoiser."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dit_video.core.errors import UserError, check_at_least
from dit_video.core.files import write_json
from dit_video.data.captions import CaptionSource
from dit_video.data.rows import RowStream
from dit_video.data.sources import ClipExamples, LatentExamples
from dit_video.distributed import count_row_shards
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.experiment import export, input_pipeline, latents, monitors
from dit_video.experiment.denoiser import (
    TrainableDenoiser,
    get_expert_names,
    get_optimizer_config,
    make_denoiser_loss,
    make_denoiser_step,
    open_trainable_denoiser,
)
from dit_video.experiment.encoders import check_encoders
from dit_video.experiment.initial_weights import check_initial_weights
from dit_video.experiment.monitors import EvaluationHook
from dit_video.experiment.run import EXCLUDED_FILE, Experiment, Run, Stage, Training, check_sizes
from dit_video.experiment.self_check.hook import SelfCheck
from dit_video.experiment.self_check.subject import CheckedTraining
from dit_video.experiment.training_config import DenoiserTraining, Student, TemporalWeights
from dit_video.models.backbones.protocol import check_frame_conditioning
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.preparation import check_requests
from dit_video.training import goodput
from dit_video.training.hooks.hook import Hook
from dit_video.training.hooks.logging import print_on_first_process
from dit_video.training.losses.auxiliary import check_losses, get_head_shapes
from dit_video.training.losses.denoiser import DenoiserLoss
from dit_video.training.trainer import BatchIterator, Trainer


@dataclass(frozen=True, kw_only=True)
class TrainDenoiser(DenoiserTraining, Stage):
    """Training of the model's denoiser on cached latents, which it encodes first, or on clips that it reads.

    Several such stages are one training: each continues the one before, in the same folder, and the last one leaves the
    pipeline.

    Raises:
      UserError: If values are out of range, or do not fit the model, the data or the other stages.
    """

    @property
    def amendable_fields(self) -> tuple[str, ...]:
        return ("accumulation_steps", "data.max_excluded_share", "data.workers", "parallel", "steps")

    def check_config(self, experiment: Experiment) -> None:
        model = self.adapt_model(experiment.get_model())
        data = experiment.data if self.data is None else self.data
        check_at_least(
            1,
            **{
                f"{self.name}.steps": self.steps,
                f"{self.name}.batch": self.batch,
                f"{self.name}.accumulation_steps": self.accumulation_steps,
            },
        )
        self.optimizer.make_schedule(steps=self.steps)
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay={self.ema_decay} is invalid: it must lie in [0, 1).")
        if not 0 <= self.caption_dropout <= 1:
            raise UserError(f"caption_dropout={self.caption_dropout} is invalid: it must lie in [0, 1].")
        if model.layout is None:
            raise UserError("model.layout=None is invalid: training packs clips. Use layout=PackedShape(...).")
        self._check_place(experiment)
        self._check_accumulation(experiment)
        check_sizes(model, data)
        if self.time_per == "frame" and model.backbone.time != "token":
            raise UserError(
                "time_per='frame' needs a denoiser with time='token'. Set backbone.time, or time_per='clip'."
            )
        if isinstance(self.train, TemporalWeights) and self.optimizer.trainable:
            raise UserError("train=TemporalWeights selects what is trained. Leave optimizer.trainable empty.")
        if self.auxiliary and isinstance(self.train, Student):
            raise UserError("train=Student has losses of its own. Leave out auxiliary, or use AllWeights.")
        check_losses(self.auxiliary, model.backbone, steps=self.steps)
        if self.buckets is not None and (data.cache_latents or data.weights):
            fix = "Set data.cache_latents=False, and leave out data.weights."
            raise UserError(f"{self.name}.buckets are read from video files, without weights of data sets. {fix}")
        frames = model.frame_conditioning
        if isinstance(self.train, Student) and frames is not None:
            raise UserError("train=Student has no frame conditioning. Leave out frame_conditioning, or use AllWeights.")
        if frames is not None and frames.has_mask_mix and self.buckets is not None:
            raise UserError("frame_conditioning.masks need packed rows. Leave out buckets.")
        conditioning = model.backbone.conditioning
        if conditioning and (isinstance(self.train, Student) or self.buckets is not None):
            names, rule = ", ".join(each.field.name for each in conditioning), "a student has none"
            if self.buckets is not None:
                rule = "buckets crop clips, which the values of a clip don't follow"
            raise UserError(f"conditioning ({names}) is invalid: {rule}. Leave out buckets, and use no Student.")
        check_frame_conditioning(
            model.backbone, model.autoencoder, frames, model.image_encoder, cached=data.cache_latents
        )

    def _check_place(self, experiment: Experiment) -> None:
        """Raise if this stage does not continue the one before, or trains another state than the last one."""
        stages = experiment.denoiser_stages
        index, last = stages.index(self), stages[-1]
        before = stages[index - 1].name if index else None
        if self.continues != before:
            fix = "Leave it out." if before is None else f"Use continues={before!r}."
            raise UserError(f"continues={self.continues!r} is invalid: it comes after {before}. {fix}")
        if self.data is not None and self.data.held_out:
            raise UserError("data.held_out applies to all stages. Set it in the experiment's data.")
        weights, own_weights = experiment.data.weights, () if self.data is None else self.data.weights
        if weights and own_weights and len(weights) != len(own_weights):
            numbers = f"{len(own_weights)} data sets, the experiment {len(weights)}"
            raise UserError(f"data.weights weighs {numbers}. Give each data set one weight.")
        if isinstance(self.train, Student) and len(stages) > 1:
            raise UserError("train=Student takes a single stage. Leave out the others, or use AllWeights.")
        state, last_state = (
            {"averages": stage.averages, "train.lora": stage.lora, "train.expert": stage.expert}
            | {"optimizer": type(stage.optimizer).__name__}
            | {"auxiliary": get_head_shapes(stage.auxiliary, experiment.get_model().backbone)}
            | {f"optimizer.{name}": getattr(optimizer, name) for name in optimizer.state_fields}
            for stage, optimizer in ((stage, get_optimizer_config(stage)) for stage in (self, last))
        )
        for name, value in state.items():
            if value != last_state.get(name):
                raise UserError(
                    f"{name}={value!r} is invalid: the last one has {last_state.get(name)!r}, and its state could not "
                    "be carried over. Use the same for all stages."
                )

    def _check_accumulation(self, experiment: Experiment) -> None:
        parts = self.accumulation_steps
        used = {"monitoring.validate_every": experiment.monitoring.validate_every > 0}
        used[f"{self.name}.accumulation_steps"] = parts > 1
        for option, is_used in used.items():
            if is_used and (self.buckets is not None or isinstance(self.train, Student)):
                raise UserError(f"{option} needs packed rows and no distillation. Leave it out.")
        if self.batch % parts:
            raise UserError(f"batch={self.batch} is not divisible by accumulation_steps={parts}. Use a multiple.")

    def adapt_run(self, run: Run) -> Run:
        """Return the run with the model, the data and the devices of this stage."""
        model = run.experiment.get_model()
        own = self.adapt_model(model)
        return run.adapt(model=None if own == model else own, data=self.data, parallel=self.parallel)

    def get_start_step(self, run: Run) -> int:
        """Return the number of steps of the stages before this one."""
        stages = run.experiment.denoiser_stages
        return sum(stage.steps for stage in stages[: stages.index(self)])

    def is_last(self, run: Run) -> bool:
        """Return whether no stage continues this one."""
        return run.experiment.denoiser == self

    def get_folder(self, run: Run) -> Path:
        """Return the folder of this stage's own files."""
        return run.folder if self.is_last(run) else run.folder / "stages" / self.name

    def is_done(self, run: Run) -> bool:
        newest, end_step = run.open_checkpoints("denoiser").latest(), self.get_start_step(run) + self.steps
        if not self.is_last(run):
            return (newest or 0) >= end_step
        # The pipeline of a finished run, which may be trained further, and whose checkpoints may be gone.
        return (run.folder / "pipeline").is_dir() and (newest is None or newest >= end_step)

    def check(self, run: Run) -> None:
        whole, run = run, self.adapt_run(run)
        latents.link_latents(run, self.get_folder(run) / "latents")
        self._record_excluded(run)
        input_pipeline.check_inputs(run, self)
        is_resuming = run.open_checkpoints("denoiser").latest() is not None
        check_initial_weights(self, run.model, is_resuming=is_resuming or self.is_done(run))
        check_encoders(run.model, run.folder)
        if not self.is_done(run):
            folder = self.get_folder(run) / "latents"
            if run.data.cache_latents:
                latents.check_latents(run, folder)
            if not run.data.cache_latents or not latents.are_encoded(folder):
                run.open_conditioning()
        self._check_evaluation(whole)

    def encode_latents(self, run: Run) -> None:
        """Encode the latents of the training clips, all processes together, unless they are encoded or not cached."""
        run = self.adapt_run(run)
        if run.data.cache_latents:
            latents.encode_latents(run, self.get_folder(run) / "latents")

    def run(self, run: Run) -> None:
        run = self.adapt_run(run)
        self.encode_latents(run)
        if not self.is_last(run):
            print_on_first_process(f"stage {self.name}: up to step {self.get_start_step(run) + self.steps}")
        with run.recorder.phase(goodput.STARTUP):
            is_new = run.open_checkpoints("denoiser").latest() is None
            trainer, open_rows, loss, trained = self._open_training(run, is_new=is_new)
            trainer = replace(
                trainer,
                hooks=(*trainer.hooks, *self._make_hooks(run, loss, trained)),
                flops_fn=monitors.make_flops_fn(self, run.model.backbone),
            )
            check = self._make_self_check(run, trainer, loss, trained, is_new=is_new)
            if check is not None:
                trainer = replace(trainer, hooks=(*trainer.hooks, check))

            def open_and_record(start: int) -> BatchIterator:
                rows = open_rows(start)
                self._record_rows(run, rows)
                return rows if check is None else check.watch(rows, start)

            state = trainer.run(open_and_record)
        if self.is_last(run):
            ema_params = state.ema
            del state
            self._export(run, trained, ema_params)

    def open_training(self, run: Run, *, is_new: bool) -> Training:
        return Training(*self._open_training(self.adapt_run(run), is_new=is_new)[:2])

    def _open_training(
        self, run: Run, *, is_new: bool
    ) -> tuple[Trainer, input_pipeline.OpenRows, DenoiserLoss, TrainableDenoiser]:
        """Return the trainer without logs, the function that opens the batches, the loss and what is trained."""
        captions, open_rows = self.open_inputs(run)
        loss = self.make_loss(run, captions)
        trained = open_trainable_denoiser(self, run.model, run.folder / "denoiser", run.mesh, is_resuming=not is_new)
        return self.make_trainer(run, loss, trained), open_rows, loss, trained

    def make_loss(self, run: Run, captions: CaptionSource) -> DenoiserLoss:
        """Return the loss, of a run as this stage sees it."""
        options: dict[str, Any] = {"empty_caption": captions.empty, "start_step": self.get_start_step(run)}
        return make_denoiser_loss(self, run.model, run.partitioner, seed=run.seed, **options)

    def make_trainer(self, run: Run, loss: DenoiserLoss, trained: TrainableDenoiser) -> Trainer:
        """Return the trainer without logs, of a run as this stage sees it."""
        start_step = self.get_start_step(run)
        trainer = run.make_trainer(
            "denoiser",
            steps=self.steps,
            init=trained.init,
            train_step=make_denoiser_step(self, loss, start_step=start_step, mesh=run.mesh),
            start_step=start_step,
        )
        load = None if trained.load_initial is None else partial(trained.load_initial, trainer.random_key)
        return replace(trainer, load_params=load, frozen_params=trained.frozen_params, averages=self.averages)

    def open_inputs(self, run: Run) -> tuple[CaptionSource, input_pipeline.OpenRows]:
        """Return the captions, and what opens the rows from a step on, of a run as this stage sees it."""
        clips = run.training_clips
        source: LatentExamples | ClipExamples
        if run.data.cache_latents:
            cached = latents.open_latents(run, self.get_folder(run) / "latents")
            captions = input_pipeline.open_captions(run.open_text_encoder(), clips, cached=cached)
            source = input_pipeline.make_latent_examples(run, cached, captions)
        else:
            captions = input_pipeline.open_captions(run.open_text_encoder(cache=run.folder / "texts"), clips)
            encode = input_pipeline.make_online_encoder(run, self, run.read_autoencoder(), clips)
            source = input_pipeline.make_clip_examples(run, clips, captions, encode)
        return captions, input_pipeline.open_rows(run, self, source, clips)

    def _make_hooks(self, run: Run, loss: DenoiserLoss, trained: TrainableDenoiser) -> tuple[Hook, ...]:
        """Return the logs, the validation and the samples that the config asks for."""
        monitoring, folder = run.experiment.monitoring, run.folder / "denoiser"
        hooks = monitors.open_logs(monitoring, folder)
        if monitoring.validate_every:
            hooks.append(monitors.make_validation(run, self, loss, trained))

        def make_pipeline(ema_params: dict[str, Any]) -> Pipeline:
            return run.make_pipeline(trained.attach_params(ema_params), parallel=run.sampling_parallelism)

        if monitoring.evaluate_every:
            hooks.append(
                EvaluationHook(
                    folder / "evaluations",
                    every=monitoring.evaluate_every,
                    protocol=run.experiment.evaluation,
                    data=run.evaluation_data(),
                    make_pipeline=make_pipeline,
                )
            )
        if monitoring.sample_every:
            requests = monitors.make_sample_requests(monitoring, run.training_clips, run.pipeline_config())
            hooks.append(monitors.make_sampling(folder / "samples", monitoring, requests, make_pipeline))
        return tuple(hooks)

    def _make_self_check(
        self, run: Run, trainer: Trainer, loss: DenoiserLoss, trained: TrainableDenoiser, *, is_new: bool
    ) -> SelfCheck | None:
        """Return the hook that checks the training; None if the config asks for none."""
        if not run.experiment.monitoring.self_check:
            return None
        encoding = latents.make_encoding(run) if run.data.cache_latents else None
        folder = self.get_folder(run) / "latents"
        subject = CheckedTraining(
            run=run,
            training=self,
            trainer=trainer,
            loss=loss,
            trained=trained,
            text_encoder=run.open_text_encoder(),
            latents=None if encoding is None else latents.open_latents(run, folder, encoding=encoding),
            encoding=encoding,
        )
        return SelfCheck(subject, is_new=is_new)

    def _record_rows(self, run: Run, rows: RowStream) -> None:
        """Write `rows.json`, and log what an epoch holds."""
        summary = rows.summarize(devices=count_row_shards(run.mesh))
        if run.process == 0:
            folder = run.folder / "denoiser" if self.is_last(run) else self.get_folder(run)
            write_json(folder / "rows.json", summary)
        imbalance = summary.get("imbalance")
        lost = f", {imbalance['mean']:.1%} of the time lost by unequal devices" if imbalance else ""
        print_on_first_process(f"{rows}{lost}")

    def _record_excluded(self, run: Run) -> None:
        """Log the clips that cannot be used, and list all of them in a file, if there are any."""
        selections = {"training": run.usable_training_clips, "held_out": run.usable_held_out_clips}
        path = self.get_folder(run) / EXCLUDED_FILE
        excluded = {name: selected for name, selected in selections.items() if selected.excluded}
        for selected in excluded.values():
            print_on_first_process(f"{selected.describe()} (all are listed in {path})")
        if run.process:
            return
        path.unlink(missing_ok=True)  # of another config, before anything was trained
        if excluded:
            write_json(path, {name: one.to_json() for name, one in excluded.items()})

    def _check_evaluation(self, run: Run) -> None:
        """Check what the monitors, and the evaluation after the training, need besides the models.

        Raises:
          MissingError: If a logging package, or what a metric reads, is missing.
          UserError: If Weights & Biases is not logged in, if no clips are held out to validate on, if there is no
            caption to sample during the training, or if the model cannot sample as the config says.
        """
        monitoring, evaluation = run.experiment.monitoring, run.experiment.evaluation
        if not self.is_done(run):
            monitors.open_logs(monitoring, run.folder / "denoiser")
            if monitoring.sample_every and run.process == 0:
                config = run.pipeline_config()
                requests = monitors.make_sample_requests(monitoring, run.training_clips, config)
                check_requests(config, requests, config.sampling)
        if run.process == 0:
            for metric in evaluation.metrics:
                metric.open_weights()
        if monitoring.validate_every and not len(run.held_out_clips):
            raise UserError(
                f"monitoring.validate_every={monitoring.validate_every} is invalid: no clips are held out to validate "
                "on. Name some in data.held_out, or leave it out."
            )
        if any(info.captions for clips in (run.training_clips, run.held_out_clips) for info in clips.infos):
            return
        samples_captions = isinstance(evaluation, CaptionEvaluation)
        if samples_captions and monitoring.evaluate_every:
            raise UserError(
                f"monitoring.evaluate_every={monitoring.evaluate_every} is invalid: no clip has a caption to sample. "
                "Give clips captions, or leave it out."
            )
        if self.is_last(run):
            consequence = ", and the report has no samples" if samples_captions else ""
            print_on_first_process(f"no clip has a caption: the denoiser is trained without text{consequence}")

    def _export(self, run: Run, trained: TrainableDenoiser, ema_params: dict[str, Any]) -> None:
        """Write the averaged weights: under the names of other projects, and as a pipeline."""
        folder, backbone = run.folder, run.model.backbone
        expert, _ = get_expert_names(self)
        if (adapter := trained.get_adapter(ema_params)) is None:
            export.save_transformer(folder, backbone, ema_params, expert=expert)
        else:
            export.save_adapter(folder, backbone, adapter, trained.base_params or {}, expert=expert)
        params = trained.merge_params(ema_params)
        run.make_pipeline(params, parallel=run.sampling_parallelism).save(folder / "pipeline")
