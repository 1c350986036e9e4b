"""Training of the two models of a run in its folder: the autoencoder's stage, and what both have in common."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Array

from dit_video.autoencoders import LinearAutoencoder, PatchVaeConfig, fit_linear, init_from_linear
from dit_video.core import config_json, pixels, rng
from dit_video.core.errors import MissingError
from dit_video.data.clips import ClipSource
from dit_video.data.latents.offline import measure_latent_moments
from dit_video.data.loader import DenoiserBatches
from dit_video.data.windows import ClipCrops, WindowBatches
from dit_video.distributed import RowPart, make_mesh
from dit_video.experiment import AutoencoderTraining, DenoiserTraining, Experiment, PretrainedAutoencoder
from dit_video.experiment.initialization import (
    get_optimizer_config,
    load_initial_params,
    load_pretrained_autoencoder,
    make_autoencoder_loss,
)
from dit_video.nn import get_graph_def, get_param_shapes, init_params
from dit_video.training import loop, trainer
from dit_video.training.checkpoint import Checkpoints
from dit_video.training.hooks.logging import print_on_first_process
from dit_video.training.hooks.profiler import TraceConfig
from dit_video.training.optim.optimizer import make_optimizer
from dit_video.training.state import to_host
from dit_video.training.step import Loss, OwnStep
from dit_video.weights import load as load_weights
from dit_video.weights import save as save_weights

_MAX_LINEAR_VALUES = 4096
"""Largest number of values of a patch whose principal components are computed, from a matrix of its square."""
_LINEAR_BATCHES, _MOMENT_BATCHES = 32, 64
"""Numbers of batches of training windows that the linear start, and the latents' mean and deviation, are measured
on."""


def train(
    experiment: Experiment,
    folder: Path,
    init: Callable[[Array], dict[str, Any]],
    loss: Loss | OwnStep,
    batches: Callable[[int], DenoiserBatches | WindowBatches],
    *,
    checkpoints: str | Path,
    begin: int = 0,
    profile: tuple[int, int] | None = None,
    **options: Any,
) -> Any:
    """Train one of the two models from its newest checkpoint, or from `init`.

    Args:
      experiment: the experiment.
      folder: `autoencoder` or `denoiser` of the run.
      init: returns parameters from a random key.
      loss: the loss of the parameters.
      batches: opens the batches from a step on, counted from `begin`.
      checkpoints: folder or address of the checkpoints.
      begin: number of steps of earlier stages.
      profile: first and last step that are traced.
      options: further arguments of `Training`.

    Raises:
      UserError: the checkpoint was trained on other data.
    """
    name = folder.name
    config = experiment.denoiser if name == "denoiser" else experiment.autoencoder
    assert not isinstance(config, PretrainedAutoencoder)  # a pretrained one is not trained
    optimizer = config.optimizer if isinstance(config, AutoencoderTraining) else get_optimizer_config(config)
    if isinstance(config, DenoiserTraining):
        options |= {"accumulation_steps": config.accumulation_steps, "averages": config.averages}
    return trainer.Trainer(
        folder=folder,
        checkpoints=checkpoints,
        title=f"training the {name}",
        init=init,
        random_key=rng.key(experiment.seed, name),
        loss=loss,
        optimizer=make_optimizer(optimizer, steps=config.steps, start_step=begin),
        ema_decay=config.ema_decay,
        start_step=begin,
        trace=None if profile is None else TraceConfig(folder / "profile", *profile),
        config=loop.LoopConfig(
            steps=begin + config.steps,
            log_every=experiment.log_every,
            save_every=experiment.save_every,
            max_consecutive_skips=experiment.max_consecutive_skips,
            preemption_grace=experiment.preemption_grace,
        ),
        mesh=make_mesh(experiment.mesh),
        keep=experiment.keep,
        resolved_config=config_json.to_json(experiment),
        **options,
    ).run(batches)


@dataclass(frozen=True, kw_only=True)
class AutoencoderStage:
    """A run's autoencoder, trained on its clips or pretrained."""

    experiment: Experiment
    folder: Path
    """Folder `autoencoder` of the run."""
    checkpoints: str | Path
    """Folder or address of the checkpoints."""
    clips: Callable[[], ClipSource]
    """Opens the training clips."""
    command: str
    """Command that continues the run."""
    profile: tuple[int, int] | None = None
    """First and last step that are traced."""

    @property
    def weights(self) -> Path:
        """Return the file of the trained weights."""
        return self.folder / "weights.safetensors"

    @property
    def is_trained(self) -> bool:
        """Return whether there are parameters to read, trained by the run or pretrained."""
        return isinstance(self.experiment.autoencoder, PretrainedAutoencoder) or self.weights.is_file()

    def read(self) -> dict[str, Any]:
        """Return the parameters of the trained autoencoder; of a pretrained one, those of its folder.

        Raises:
          MissingError: it is not trained yet.
        """
        config = self.experiment.autoencoder
        if isinstance(config, PretrainedAutoencoder):
            return load_pretrained_autoencoder(config)
        if not self.weights.is_file():
            raise MissingError(
                f"{self.folder.parent} has no trained autoencoder yet; continue its training with: {self.command}"
            )
        return load_weights(self.weights, like=get_param_shapes(config.model.make))

    def train(self) -> dict[str, Any]:
        """Train the autoencoder unless it is trained, or pretrained, and return its parameters.

        They are averages, with the mean and deviation of the latents measured. Where the config does not train
        `normalizer`, these are unchanged.
        """
        config, experiment = self.experiment.autoencoder, self.experiment
        if isinstance(config, PretrainedAutoencoder) or self.is_trained:  # the first part narrows the type
            return self.read()
        graph, parts = get_graph_def(config.model.make), make_autoencoder_loss(config, experiment.seed)
        continues = Checkpoints(self.checkpoints).latest() is not None
        crops = ClipCrops(self.clips(), experiment.window_limits)
        start = functools.partial(load_initial_params, config, rng.key(experiment.seed, "inflation"))
        linear = self._fit_linear(crops) if isinstance(config.model, PatchVaeConfig) and not continues else None

        def init(key: Array) -> dict[str, Any]:
            params = init_params(config.model.make, key)
            return params if linear is None else init_from_linear(params, linear)

        batches = functools.partial(self.open_windows, crops, purpose="autoencoder")
        options: dict[str, Any] = {"load_params": start, "profile": self.profile, "checkpoints": self.checkpoints}
        state = train(experiment, self.folder, init, parts.pop("loss"), batches, **options, **parts)
        params = to_host(state.ema)
        if config.optimizer.is_trained("normalizer/mean"):
            with contextlib.closing(self.open_windows(crops, 0, "latent moments")) as windows:
                mean, std = measure_latent_moments(graph, params, itertools.islice(windows, _MOMENT_BATCHES))
            params["normalizer"] = {"mean": mean, "std": std}
        save_weights(self.weights, params)
        return params

    def open_windows(self, crops: ClipCrops, start: int, purpose: str, *, augment: bool = True) -> WindowBatches:
        """Return batches of the window shapes in turn, from step `start` on. Each purpose has windows of its own.

        With `augment` they are augmented where the config says so.
        """
        training = self.experiment.autoencoder
        assert isinstance(training, AutoencoderTraining)  # a pretrained one has no windows
        part = RowPart.from_mesh(make_mesh(self.experiment.mesh))
        windows = training.windows
        if not augment:
            windows = tuple(dataclasses.replace(window, augment=None) for window in windows)
        window_batches = WindowBatches(
            crops,
            windows,
            seed=int(rng.make_generator(self.experiment.seed, purpose).integers(2**31)),
            start_step=start,
            # Each process measures statistics on whole batches, so that all get the same values.
            host=part.part_index if purpose == "autoencoder" else 0,
            hosts=part.part_count if purpose == "autoencoder" else 1,
        )
        if purpose == "autoencoder" and window_batches.excluded_clips:
            count = len(window_batches.excluded_clips)
            print_on_first_process(f"{count} clips are smaller than a window of the autoencoder's training")
        return window_batches

    def fit_linear_baseline(self) -> LinearAutoencoder | None:
        """Return the best linear autoencoder with as many latent values, fitted on the training clips, as a baseline.

        Returns:
          None where a patch has too many values for it, or where the autoencoder is pretrained.
        """
        config = self.experiment.autoencoder
        if isinstance(config, PretrainedAutoencoder) or 3 * config.model.stride.volume > _MAX_LINEAR_VALUES:
            return None
        return self._fit_linear(ClipCrops(self.clips(), self.experiment.window_limits))

    def _fit_linear(self, crops: ClipCrops) -> LinearAutoencoder:
        """Return the principal components of the unaugmented training clips, which are cached in the run's folder."""
        model = self.experiment.autoencoder.model
        path = self.folder / "linear.safetensors"
        if path.is_file():
            return LinearAutoencoder(**load_weights(path))
        with contextlib.closing(self.open_windows(crops, 0, "linear start", augment=False)) as batches:
            first = itertools.islice(batches, _LINEAR_BATCHES)
            fitted = fit_linear(map(pixels.to_float, first), stride=model.stride, channels=model.channels)
        save_weights(path, fitted._asdict())
        return fitted
