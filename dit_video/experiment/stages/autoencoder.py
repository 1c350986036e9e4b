"""The stage that trains the autoencoder."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dit_video.core import config_json, rng
from dit_video.core.errors import UserError, check_at_least
from dit_video.core.files import read_json, write_json
from dit_video.data.latents.codec import LatentCodec
from dit_video.data.latents.offline import measure_latent_moments
from dit_video.data.windows import ClipCrops, FittedWindows, WindowBatches, WindowConfig
from dit_video.distributed import RowPart
from dit_video.distributed.gather import to_host
from dit_video.experiment import monitors
from dit_video.experiment.autoencoder import (
    TrainingWindows,
    limit_windows,
    load_initial_params,
    make_autoencoder_step,
    make_init,
    open_windows,
)
from dit_video.experiment.run import Experiment, Run, Stage, Training
from dit_video.experiment.training_config import AutoencoderTraining
from dit_video.models.autoencoders import latent_grid
from dit_video.models.features.lpips import MIN_SIDE as LPIPS_SMALLEST
from dit_video.nn import get_graph_def
from dit_video.sampling.pipeline_config import PREVIEW
from dit_video.sampling.preview import fit_preview_decoder
from dit_video.training import goodput
from dit_video.training.hooks.hook import Hook
from dit_video.training.hooks.logging import print_on_first_process
from dit_video.video import Clip
from dit_video.weights import save as save_weights

WINDOWS = "windows.json"
"""File in the folder of a training with the shapes of its windows, and the number of clips that have room for each."""
_MOMENT_BATCHES = 64
"""Number of batches of training windows that the latents' mean and deviation are measured on."""
_PREVIEW_WINDOWS, _PREVIEW_LATENTS = 256, 32768
"""Maximum numbers of windows, and of their latents, that the preview decoder is fitted to: seconds of decoding."""


@dataclass(frozen=True, kw_only=True)
class TrainAutoencoder(AutoencoderTraining, Stage):
    """Training of the model's autoencoder on windows of the training clips.

    Its weights are averages. The mean and deviation of the latents are measured at its end, if the model has a
    `normalizer` and the config trains it.

    Raises:
      UserError: If values are out of range, or windows do not fit the autoencoder, its loss or the clips.
    """

    output = "weights.safetensors"

    @property
    def amendable_fields(self) -> tuple[str, ...]:
        return ("steps",)

    def check_config(self, experiment: Experiment) -> None:
        if self.name != "autoencoder":
            raise UserError(f"name={self.name!r} is invalid: the autoencoder has this folder. Use name='autoencoder'.")
        check_at_least(1, **{"autoencoder.steps": self.steps})
        self.optimizer.make_schedule(steps=self.steps)
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay={self.ema_decay} is invalid: it must lie in [0, 1).")
        adversarial = self.loss.adversarial
        if adversarial is not None and adversarial.start_step >= self.steps:
            raise UserError(
                f"adversarial.start_step={adversarial.start_step} is invalid: the autoencoder is trained for only "
                f"{self.steps} steps. Start earlier, or leave out adversarial."
            )
        if not isinstance(self.windows, FittedWindows):
            self._check_windows(self.windows, experiment)

    def check(self, run: Run) -> None:
        if self.is_done(run):
            return
        if run.has_begun(self.name):
            run.check_kept_clips()
        if isinstance(self.windows, FittedWindows):
            self._check_windows(self._fix_windows(run), run.experiment)

    def _check_windows(self, windows: Sequence[WindowConfig], experiment: Experiment) -> None:
        if not windows:
            raise UserError("autoencoder.windows is empty: training needs at least one window shape.")
        stride, limits = experiment.get_model().autoencoder.stride, limit_windows(self, experiment.limits)
        for window in windows:
            try:
                latent_grid(window.size, stride)
            except UserError as error:
                raise UserError(f"window does not fit the autoencoder: {error}") from error
        adversarial = self.loss.adversarial
        smallest = min(min(window.size[1:]) for window in windows)
        if adversarial is not None and smallest < 2**adversarial.layers:
            raise UserError(
                f"adversarial.layers={adversarial.layers} is invalid: a discriminator of this depth needs windows of "
                f"{2**adversarial.layers} pixels or more, but one has {smallest}. Use fewer layers or larger windows."
            )
        if self.loss.lpips and smallest < LPIPS_SMALLEST:
            raise UserError(f"LPIPS needs windows of {LPIPS_SMALLEST} pixels or more, not {smallest}. Use larger ones.")
        for window in windows:
            t, h, w = window.size
            if t > limits.max_frames or h * w > limits.max_pixels:
                raise UserError(
                    f"a window of {t}x{h}x{w} is larger than any clip of {limits.max_frames} frames of "
                    f"{limits.max_pixels} pixels. Use a smaller window, or raise max_frames or max_pixels."
                )

    def _fix_windows(self, run: Run) -> tuple[WindowConfig, ...]:
        """Return the windows that were chosen when the training began, or are chosen for it now."""
        path = run.folder / self.name / WINDOWS
        if isinstance(self.windows, FittedWindows) and path.is_file():
            return tuple(config_json.from_json(each["window"]) for each in read_json(path))
        return self.choose_windows(self.open_crops(run))

    def _record_windows(self, run: Run, crops: ClipCrops) -> None:
        """Print the shapes of the training's windows, and write them to a file."""
        windows = self.choose_windows(crops)
        counts = [int((crops.sizes >= window.size).all(axis=1).sum()) for window in windows]
        shapes = (
            f"{window.size} of {count} clips ({window.batch} a step)"
            for window, count in zip(windows, counts, strict=True)
        )
        print_on_first_process(f"the autoencoder is trained on windows of {', '.join(shapes)}")
        if run.process == 0:
            pairs = zip(windows, counts, strict=True)
            content = [{"window": config_json.to_json(window), "clips": count} for window, count in pairs]
            write_json(run.folder / self.name / WINDOWS, content)

    def run(self, run: Run) -> None:
        dataclasses.replace(self, windows=self._fix_windows(run))._train(run)

    def _train(self, run: Run) -> None:
        graph = get_graph_def(run.model.autoencoder.make)
        with run.recorder.phase(goodput.STARTUP):
            crops = self.open_crops(run)
            is_new = run.open_checkpoints(self.name).latest() is None
            trainer, open_batches = self.open_training(run, is_new=is_new)
            self._record_windows(run, crops)
            trainer = dataclasses.replace(trainer, hooks=(*trainer.hooks, *self._make_hooks(run)))
            state = trainer.run(open_batches)
        params = to_host(state.ema)
        if "normalizer" in params and self.optimizer.is_trained("normalizer/mean"):
            # Each process measures on whole batches, so that all get the same values.
            with contextlib.closing(open_windows(self, crops, "latent moments", seed=run.seed)) as windows:
                mean, std = measure_latent_moments(graph, params, itertools.islice(windows, _MOMENT_BATCHES))
            params["normalizer"] = {"mean": mean, "std": std}
        if run.process == 0:
            self._fit_preview_decoder(run, crops, params)
            save_weights(self.get_output(run), params)

    def open_training(self, run: Run, *, is_new: bool) -> Training:
        model, crops = run.model.autoencoder, self.open_crops(run)
        stage = dataclasses.replace(self, windows=self._fix_windows(run))
        step, constants = make_autoencoder_step(self, model, run.seed, mesh=run.mesh)
        windows = TrainingWindows(run.folder / self.name, stage, crops, run.seed)
        init = make_init(model, windows if is_new and self.init_from is None else None)
        trainer = run.make_trainer(self.name, steps=self.steps, init=init, train_step=step)
        load_params = functools.partial(load_initial_params, self, model, rng.key(run.seed, "inflation"))
        trainer = dataclasses.replace(trainer, load_params=load_params, constants=constants)
        return Training(trainer, functools.partial(stage.open_batches, run, crops))

    def open_crops(self, run: Run) -> ClipCrops:
        """Return the training clips at the sizes that windows are cut from."""
        return ClipCrops(run.training_clips, limit_windows(self, run.limits))

    def open_batches(self, run: Run, crops: ClipCrops, start: int) -> WindowBatches:
        """Return the batches of the training from step `start` on."""
        part = RowPart.from_mesh(run.mesh)
        batches = open_windows(self, crops, "autoencoder", seed=run.seed, start=start, part=part)
        if batches.excluded_clips:
            count = len(batches.excluded_clips)
            print_on_first_process(f"{count} clips are smaller than a window of the autoencoder's training")
        return batches

    def _fit_preview_decoder(self, run: Run, crops: ClipCrops, params: dict[str, Any]) -> None:
        """Write the preview decoder of the trained autoencoder, fitted to unaugmented windows."""
        model = run.model.autoencoder
        latents = max(latent_grid(window.size, model.stride).volume for window in self.choose_windows(crops))
        count = min(_PREVIEW_WINDOWS, max(1, _PREVIEW_LATENTS // latents))
        with contextlib.closing(open_windows(self, crops, "preview", seed=run.seed, augment=False)) as batches:
            windows = itertools.islice(itertools.chain.from_iterable(batches), count)
            clips = (Clip(frames=window, fps=1.0) for window in windows)
            decoder = fit_preview_decoder(LatentCodec(model, params), clips)
        decoder.save(run.folder / self.name / PREVIEW)

    def _make_hooks(self, run: Run) -> tuple[Hook, ...]:
        """Return the reconstructions of held-out clips, or of training clips if none is held out, if configured."""
        monitoring = run.experiment.monitoring
        if not monitoring.sample_every:
            return ()
        clips = run.held_out_clips if len(run.held_out_clips) else run.training_clips
        folder = run.folder / self.name / "reconstructions"
        return (monitors.make_reconstructions(folder, monitoring, run.model.autoencoder, clips, run.limits),)
