"""The stage that trains the autoencoder."""

import contextlib
import dataclasses
import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Array

from dit_video.core import pixels, rng
from dit_video.data.latents.codec import LatentCodec
from dit_video.data.latents.offline import measure_latent_moments
from dit_video.data.windows import ClipCrops, WindowBatches
from dit_video.distributed import RowPart
from dit_video.distributed.gather import to_host
from dit_video.experiment import monitors
from dit_video.experiment.autoencoder import WEIGHTS_FILE, load_initial_params, make_autoencoder_step
from dit_video.experiment.config import Experiment
from dit_video.experiment.runtime import Runtime, Stage, Training
from dit_video.experiment.training_config import AutoencoderTraining, PretrainedAutoencoder
from dit_video.models.autoencoders import LinearAutoencoder, PatchVaeConfig, fit_linear, init_from_linear, latent_grid
from dit_video.nn import get_graph_def, init_params
from dit_video.sampling.pipeline_config import PREVIEW
from dit_video.sampling.preview import fit_preview_decoder
from dit_video.training import goodput
from dit_video.training.hooks.hook import Hook
from dit_video.training.hooks.logging import print_on_first_process
from dit_video.video import Clip
from dit_video.weights import load as load_weights
from dit_video.weights import save as save_weights

_MAX_LINEAR_VALUES = 4096
"""Largest number of values of a patch whose principal components are computed, from a matrix of its square."""
_LINEAR_BATCHES, _MOMENT_BATCHES = 32, 64
"""Numbers of batches of training windows that the linear start, and the latents' mean and deviation, are measured
on."""

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
        linear = self._fit_linear(runtime, crops) if isinstance(config.model, PatchVaeConfig) and is_new else None

        def init(key: Array) -> dict[str, Any]:
            params = init_params(config.model.make, key)
            return params if linear is None else init_from_linear(params, linear)

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
        return self._fit_linear(runtime, ClipCrops(runtime.training_clips, self.experiment.window_limits))

    def _fit_linear(self, runtime: Runtime, crops: ClipCrops) -> LinearAutoencoder:
        """Return the principal components of the unaugmented training clips, which are cached in the run's folder."""
        model = self.experiment.autoencoder.model
        path = runtime.folder / self.name / "linear.safetensors"
        if path.is_file():
            return LinearAutoencoder(**load_weights(path))
        with contextlib.closing(self.open_windows(runtime, crops, 0, "linear start", augment=False)) as batches:
            first = itertools.islice(batches, _LINEAR_BATCHES)
            fitted = fit_linear(map(pixels.to_float, first), stride=model.stride, channels=model.channels)
        save_weights(path, fitted._asdict())
        return fitted

    @property
    def _training(self) -> AutoencoderTraining:
        assert isinstance(self.experiment.autoencoder, AutoencoderTraining)  # a pretrained one is not trained
        return self.experiment.autoencoder
