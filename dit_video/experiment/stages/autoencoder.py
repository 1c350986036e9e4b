"""The stage that trains the autoencoder."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from dit_video.core import pixels, rng
from dit_video.data.latents.codec import LatentCodec
from dit_video.data.latents.offline import measure_latent_moments
from dit_video.data.windows import ClipCrops, WindowBatches
from dit_video.distributed import RowPart
from dit_video.distributed.gather import to_host
from dit_video.experiment import monitors
from dit_video.experiment.autoencoder import WEIGHTS_FILE, load_initial_params, make_autoencoder_step, make_init
from dit_video.experiment.config import Experiment
from dit_video.experiment.runtime import Runtime, Stage, Training
from dit_video.experiment.training_config import AutoencoderTraining, PretrainedAutoencoder
from dit_video.models.autoencoders import LinearAutoencoder, fit_linear, latent_grid
from dit_video.nn import get_graph_def
from dit_video.sampling.pipeline_config import PREVIEW
from dit_video.sampling.preview import fit_preview_decoder
from dit_video.tokens import Grid
from dit_video.training import goodput
from dit_video.training.hooks.hook import Hook
from dit_video.training.hooks.logging import print_on_first_process
from dit_video.video import Clip
from dit_video.weights import load as load_weights
from dit_video.weights import save as save_weights

_MAX_LINEAR_VALUES = 4096
"""Largest number of values of a patch whose principal components are computed, from a matrix of its square."""
_STATISTICS_BATCHES, _MOMENT_BATCHES = 32, 64
"""Numbers of batches of training windows that statistics of the clips, and the latents' mean and deviation, are
measured on."""

_PREVIEW_WINDOWS, _PREVIEW_LATENTS = 256, 32768
"""Maximum numbers of windows, and of their latents, that the preview decoder is fitted to: seconds of decoding."""


@dataclass(frozen=True, kw_only=True)
class TrainAutoencoder(Stage):
    """Training of the autoencoder on windows of the training clips; a pretrained one is not trained.

    Its weights are averages, with the mean and deviation of the latents measured. Where the config does not train
    `normalizer`, these are unchanged.
    """

    experiment: Experiment
    name: str = "autoencoder"

    def list_outputs(self, runtime: Runtime) -> tuple[Path, ...]:
        is_pretrained = isinstance(self.experiment.autoencoder, PretrainedAutoencoder)
        return () if is_pretrained else (runtime.folder / WEIGHTS_FILE,)

    def run(self, runtime: Runtime) -> None:
        config = self._training
        graph = get_graph_def(config.model.make)
        with runtime.recorder.phase(goodput.STARTUP):
            crops = ClipCrops(runtime.training_clips, self.experiment.window_limits)
            is_new = runtime.open_checkpoints(self.name).latest() is None
            trainer, open_batches = self.open_training(runtime, is_new=is_new)
            trainer = dataclasses.replace(trainer, hooks=(*trainer.hooks, *self._make_hooks(runtime)))
            state = trainer.run(open_batches)
        params = to_host(state.ema)
        if config.optimizer.is_trained("normalizer/mean"):
            with contextlib.closing(self.open_windows(runtime, crops, 0, "latent moments")) as windows:
                mean, std = measure_latent_moments(graph, params, itertools.islice(windows, _MOMENT_BATCHES))
            params["normalizer"] = {"mean": mean, "std": std}
        if runtime.process == 0:
            self._fit_preview_decoder(runtime, crops, params)
            # The last output: the stage is done when it is there.
            save_weights(runtime.folder / WEIGHTS_FILE, params)

    def open_training(self, runtime: Runtime, *, is_new: bool) -> Training:
        config = self._training
        step, constants = make_autoencoder_step(config, runtime.seed, mesh=runtime.mesh)
        crops = ClipCrops(runtime.training_clips, self.experiment.window_limits)
        needs_clips = is_new and config.init_from is None
        init = make_init(config, TrainingWindows(self, runtime, crops) if needs_clips else None)
        trainer = runtime.make_trainer(self.name, steps=config.steps, init=init, train_step=step)
        load_params = functools.partial(load_initial_params, config, rng.key(runtime.seed, "inflation"))
        trainer = dataclasses.replace(trainer, load_params=load_params, constants=constants)
        return Training(trainer, functools.partial(self.open_windows, runtime, crops, purpose="autoencoder"))

    def _fit_preview_decoder(self, runtime: Runtime, crops: ClipCrops, params: dict[str, Any]) -> None:
        """Write the preview decoder of the trained autoencoder, fitted to unaugmented windows."""
        config = self._training
        latents = max(latent_grid(window.size, config.model.stride).volume for window in config.windows)
        count = min(_PREVIEW_WINDOWS, max(1, _PREVIEW_LATENTS // latents))
        with contextlib.closing(self.open_windows(runtime, crops, 0, "preview", augment=False)) as batches:
            windows = itertools.islice(itertools.chain.from_iterable(batches), count)
            clips = (Clip(frames=window, fps=1.0) for window in windows)
            decoder = fit_preview_decoder(LatentCodec(config.model, params), clips)
        decoder.save(runtime.folder / self.name / PREVIEW)

    def _make_hooks(self, runtime: Runtime) -> tuple[Hook, ...]:
        """Return the reconstructions of held-out clips, or of training clips if none is held out, if configured."""
        experiment = self.experiment
        if not experiment.monitoring.sample_every:
            return ()
        clips = runtime.held_out_clips if len(runtime.held_out_clips) else runtime.training_clips
        folder, limits = runtime.folder / self.name / "reconstructions", experiment.limits
        model = self._training.model
        return (monitors.make_reconstructions(folder, experiment.monitoring, model, clips, limits),)

    def open_windows(
        self, runtime: Runtime, crops: ClipCrops, start: int, purpose: str, *, augment: bool = True
    ) -> WindowBatches:
        """Return batches of the window shapes in turn, from step `start` on. Each purpose has windows of its own.

        With `augment` they are augmented where the config says so.
        """
        windows, is_training = self._training.windows, purpose == "autoencoder"
        if not augment:
            windows = tuple(dataclasses.replace(window, augment=None) for window in windows)
        # Each process measures statistics on whole batches, so that all get the same values.
        host, hosts = RowPart.from_mesh(runtime.mesh)[:2] if is_training else (0, 1)
        window_batches = WindowBatches(
            crops,
            windows,
            seed=int(rng.make_generator(runtime.seed, purpose).integers(2**31)),
            start_step=start,
            host=host,
            hosts=hosts,
        )
        if is_training and window_batches.excluded_clips:
            count = len(window_batches.excluded_clips)
            print_on_first_process(f"{count} clips are smaller than a window of the autoencoder's training")
        return window_batches

    def fit_linear_baseline(self, runtime: Runtime) -> LinearAutoencoder | None:
        """Return the best linear autoencoder with as many latent values, fitted on the training clips, as a baseline.

        Returns:
          None where a patch has too many values for it, or where the autoencoder is pretrained.
        """
        config = self.experiment.autoencoder
        if isinstance(config, PretrainedAutoencoder) or 3 * config.model.stride.volume > _MAX_LINEAR_VALUES:
            return None
        crops = ClipCrops(runtime.training_clips, self.experiment.window_limits)
        windows = TrainingWindows(self, runtime, crops)
        return windows.fit_linear(stride=config.model.stride, channels=config.model.channels)

    @property
    def _training(self) -> AutoencoderTraining:
        assert isinstance(self.experiment.autoencoder, AutoencoderTraining)  # a pretrained one is not trained
        return self.experiment.autoencoder


class TrainingWindows(NamedTuple):
    """The first windows of a training without augmentation, and their statistics: `ClipStatistics` of its config."""

    stage: TrainAutoencoder
    runtime: Runtime
    crops: ClipCrops

    def read_windows(self) -> Iterator[Float32[np.ndarray, "B T H W 3"]]:
        """Yield batches of windows, with pixels in [-1, 1]."""
        batches = self.stage.open_windows(self.runtime, self.crops, 0, "linear start", augment=False)
        with contextlib.closing(batches):
            yield from map(pixels.to_float, itertools.islice(batches, _STATISTICS_BATCHES))

    def fit_linear(self, *, stride: Grid, channels: int) -> LinearAutoencoder:
        """Return the best linear autoencoder of the windows, which the folder of the run keeps."""
        name = f"linear_{stride.t}x{stride.h}x{stride.w}_{channels}.safetensors"
        path = self.runtime.folder / self.stage.name / name
        if path.is_file():
            return LinearAutoencoder(**load_weights(path))
        fitted = fit_linear(self.read_windows(), stride=stride, channels=channels)
        save_weights(path, fitted._asdict())
        return fitted
