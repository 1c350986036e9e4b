"""Training of a model's autoencoder: its initial and trained weights, its windows, and its step."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float32

from dit_video.core import config_json, pixels, rng
from dit_video.core.errors import MissingError, UserError
from dit_video.core.trees import flatten, map_with_path
from dit_video.data.sizes import SizeLimits
from dit_video.data.windows import ClipCrops, WindowBatches
from dit_video.distributed import RowPart
from dit_video.distributed.mesh import AnyMesh
from dit_video.experiment.initial_weights import describe_difference
from dit_video.experiment.training_config import AutoencoderTraining
from dit_video.families import load_autoencoder
from dit_video.models.autoencoders import AutoencoderConfig, ClipStatistics, LinearAutoencoder, fit_linear
from dit_video.models.features import Lpips
from dit_video.nn import get_graph_def, get_param_shapes, init_params
from dit_video.sampling.pipeline_config import (
    AUTOENCODER,
    RUN_CONFIG,
    is_pipeline_folder,
    read_pipeline_config,
    read_run_document,
)
from dit_video.tokens import Grid
from dit_video.training.losses.adversarial import AdversarialStep, DiscriminatorTraining
from dit_video.training.losses.autoencoder import AutoencoderLoss, AutoencoderStep
from dit_video.training.step import TrainStep
from dit_video.weights import load as load_weights
from dit_video.weights import load_lpips
from dit_video.weights import save as save_weights

WEIGHTS_FILE = "autoencoder/weights.safetensors"
"""File of the trained weights in the folder of a run."""
MAX_LINEAR_VALUES = 4096
"""Largest number of values of a patch whose principal components are a baseline: they are of a matrix of its square."""
_STATISTICS_BATCHES = 32
"""Number of batches of training windows that statistics of the clips are measured on."""


def make_init(model: AutoencoderConfig, clips: ClipStatistics | None) -> Callable[[Array], dict[str, Any]]:
    """Return the function from a random key to initial parameters; those that follow from the clips are computed now.

    Args:
      model: The autoencoder.
      clips: Statistics of the training clips; None for a training that has begun, or begins with other weights.

    Raises:
      UserError: If the model lacks a parameter that its config computes from the clips, or has it in another shape.
    """
    fitted = {} if clips is None else flatten(model.init_from_clips(clips))
    shapes = {path: leaf.shape for path, leaf in flatten(get_param_shapes(model.make)).items()} if fitted else {}
    for path, leaf in fitted.items():
        if shapes.get(path) != np.shape(leaf):
            name = f"{type(model).__name__}.init_from_clips"
            raise UserError(
                f"{name} is invalid: {path} has shape {np.shape(leaf)}, that of the model {shapes.get(path)}. Use "
                "paths and shapes of the parameters"
            )

    def init(key: Array) -> dict[str, Any]:
        return map_with_path(lambda path, leaf: fitted.get(path, leaf), init_params(model.make, key))

    return init


def load_initial_params(training: AutoencoderTraining, model: AutoencoderConfig, key: Array) -> dict[str, Any] | None:
    """Load the parameters of `model` from the folder `training.init_from`; None without a folder.

    `key` is for parameters that the folder lacks, such as the temporal layers of an inflated image autoencoder.

    Raises:
      MissingError: If the folder does not exist, or lacks files.
      UserError: If the weights cannot be read, or are of another autoencoder.
    """
    if training.init_from is None:
        return None
    load = functools.partial(_load_autoencoder_params, training.init_from)
    return model.init_from_weights(load, key)


def read_autoencoder(
    model: AutoencoderConfig, folder: Path, *, pretrained: str | None = None, is_trained: bool = True, command: str = ""
) -> dict[str, Any]:
    """Read the parameters of a run's autoencoder.

    Args:
      model: The autoencoder.
      folder: Folder of the run.
      pretrained: Folder of a pretrained autoencoder; None for one that the run trains, or without weights.
      is_trained: Whether the run trains it.
      command: Command that continues the run, for the message.

    Raises:
      MissingError: If the autoencoder is not trained yet, or if its folder does not exist or lacks files.
      UserError: If the weights cannot be read, or are of another autoencoder.
    """
    if not is_trained:
        return {} if pretrained is None else _load_autoencoder_params(pretrained, model)
    if not (folder / WEIGHTS_FILE).is_file():
        raise MissingError(f"{folder} has no trained autoencoder yet; continue its training with: {command}")
    return load_weights(folder / WEIGHTS_FILE, like=get_param_shapes(model.make))


def _load_autoencoder_params(folder: str, expected: AutoencoderConfig) -> dict[str, Any]:
    """Read the parameters of the autoencoder of a pipeline, of a run, or in diffusers' layout."""
    of_run = Path(folder) / "pipeline"
    if is_pipeline_folder(pipeline := of_run if is_pipeline_folder(of_run) else Path(folder)):
        config = read_pipeline_config(pipeline).model.autoencoder
        params = load_weights(pipeline / AUTOENCODER, like=get_param_shapes(config.make))
    elif (Path(folder) / RUN_CONFIG).is_file():  # its denoiser is not trained, or it has none
        document = read_run_document(folder)
        config = config_json.from_json(document["experiment"]).get_model().autoencoder
        params = read_autoencoder(config, Path(folder), command=document["command"])
    else:
        config, params = load_autoencoder(folder)
    if difference := describe_difference(config, expected):
        raise UserError(f"{folder} holds another autoencoder than the config's: {difference}")
    return params


def make_autoencoder_step(
    training: AutoencoderTraining, model: AutoencoderConfig, seed: int, *, mesh: AnyMesh | None = None
) -> tuple[TrainStep, tuple[Any, ...]]:
    """Return the step of an autoencoder's training, and its constants: the weights of LPIPS if it is used.

    The state is sharded on the mesh; None is for a single device.

    Raises:
      MissingError: If the file of the LPIPS weights does not exist.
      UserError: If the file holds other weights.
    """
    objective, file = training.loss, training.loss.lpips_weights
    loss = AutoencoderLoss(
        graph=get_graph_def(model.make),
        objective=objective,
        latents=model.make_loss(objective, training.optimizer.is_trained),
        seed=seed,
        perceptual_net=None if file is None else get_graph_def(lambda rngs: Lpips(rngs=rngs)),
        optimizer=training.optimizer,
    )
    optimizer = training.optimizer.make(steps=training.steps, mesh=mesh)
    step = AutoencoderStep(loss=loss, optimizer=optimizer, ema_decay=training.ema_decay, mesh=mesh)
    constants = () if file is None else (load_lpips(file),)
    if objective.adversarial is None:
        return step, constants
    discriminator = DiscriminatorTraining(
        config=objective.adversarial,
        last_layer=model.last_layer,
        random_key=rng.key(seed, "discriminator"),
    )
    return AdversarialStep(autoencoder=step, discriminator=discriminator), constants


def limit_windows(training: AutoencoderTraining, limits: SizeLimits) -> SizeLimits:
    """Return the limits on the sizes that clips are resized to before windows are cut, for the data's limits."""
    max_pixels, max_frames = training.max_pixels or limits.max_pixels, training.max_frames or limits.max_frames
    return dataclasses.replace(limits, max_pixels=max_pixels, max_frames=max_frames)


def open_windows(
    training: AutoencoderTraining,
    crops: ClipCrops,
    purpose: str,
    *,
    seed: int,
    start: int = 0,
    part: RowPart | None = None,
    augment: bool = True,
) -> WindowBatches:
    """Return batches of the window shapes in turn, from step `start` on. Each purpose has windows of its own.

    Args:
      training: The training.
      crops: The clips.
      purpose: What the windows are for.
      seed: Seed of the run.
      start: Step that the batches begin with.
      part: Part of each batch that this process has; None for whole batches.
      augment: Whether windows are augmented where the config says so.
    """
    windows = training.choose_windows(crops)
    if not augment:
        windows = tuple(dataclasses.replace(window, augment=None) for window in windows)
    return WindowBatches(
        crops,
        windows,
        seed=int(rng.make_generator(seed, purpose).integers(2**31)),
        start_step=start,
        host=0 if part is None else part.part_index,
        hosts=1 if part is None else part.part_count,
    )


class TrainingWindows(NamedTuple):
    """The first windows of a training without augmentation, and their statistics: `ClipStatistics` of its config."""

    folder: Path
    """Folder of the training."""
    training: AutoencoderTraining
    crops: ClipCrops
    seed: int
    """Seed of the run."""

    def read_windows(self) -> Iterator[Float32[np.ndarray, "B T H W 3"]]:
        """Yield batches of windows, with pixels in [-1, 1]."""
        batches = open_windows(self.training, self.crops, "linear start", seed=self.seed, augment=False)
        with contextlib.closing(batches):
            yield from map(pixels.to_float, itertools.islice(batches, _STATISTICS_BATCHES))

    def fit_linear(self, *, stride: Grid, channels: int) -> LinearAutoencoder:
        """Return the best linear autoencoder of the windows, which the folder keeps."""
        path = self.folder / f"linear_{stride.t}x{stride.h}x{stride.w}_{channels}.safetensors"
        if path.is_file():
            return LinearAutoencoder(**load_weights(path))
        fitted = fit_linear(self.read_windows(), stride=stride, channels=channels)
        save_weights(path, fitted._asdict())
        return fitted
