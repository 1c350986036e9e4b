"""Autoencoders of an experiment: initial and trained weights, and the training step."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array

from dit_video.core import rng
from dit_video.core.errors import MissingError, UserError
from dit_video.core.trees import flatten, map_with_path
from dit_video.distributed.mesh import AnyMesh
from dit_video.experiment.initial_weights import describe_difference
from dit_video.experiment.training_config import AutoencoderTraining, PretrainedAutoencoder
from dit_video.families import load_autoencoder
from dit_video.models.autoencoders import AutoencoderConfig, ClipStatistics
from dit_video.models.features import Lpips
from dit_video.nn import get_graph_def, get_param_shapes, init_params
from dit_video.sampling.pipeline_config import AUTOENCODER, is_pipeline_folder, read_pipeline_config
from dit_video.training.losses.adversarial import AdversarialStep, DiscriminatorTraining
from dit_video.training.losses.autoencoder import AutoencoderLoss, AutoencoderStep
from dit_video.training.optim.optimizer import make_optimizer
from dit_video.training.step import TrainStep
from dit_video.weights import load as load_weights
from dit_video.weights import load_lpips

WEIGHTS_FILE = "autoencoder/weights.safetensors"
"""File of the trained weights in the folder of a run."""


def make_init(training: AutoencoderTraining, clips: ClipStatistics | None) -> Callable[[Array], dict[str, Any]]:
    """Return the function from a random key to initial parameters; those that follow from the clips are computed now.

    Args:
      training: Config of the training.
      clips: Statistics of the training clips; None for a training that has begun, or begins with other weights.

    Raises:
      UserError: If the model lacks a parameter that its config computes from the clips, or has it in another shape.
    """
    model = training.model
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


def load_initial_params(training: AutoencoderTraining, key: Array) -> dict[str, Any] | None:
    """Load the parameters of `training.model` from the folder `training.init_from`; None without a folder.

    `key` is for parameters that the folder lacks, such as the temporal layers of an inflated image autoencoder.

    Raises:
      MissingError: If the folder does not exist, or lacks files.
      UserError: If the weights cannot be read, or are of another autoencoder.
    """
    if training.init_from is None:
        return None
    load = functools.partial(_load_autoencoder_params, training.init_from)
    return training.model.init_from_weights(load, key)


def read_autoencoder(
    config: AutoencoderTraining | PretrainedAutoencoder, folder: Path, *, command: str = ""
) -> dict[str, Any]:
    """Read the parameters of a run's autoencoder: the trained ones, or the ones in a pretrained autoencoder's folder.

    Args:
      config: The run's autoencoder.
      folder: Folder of the run.
      command: Command that continues the run, for the message.

    Raises:
      MissingError: If the autoencoder is not trained yet, or if its folder does not exist or lacks files.
      UserError: If the weights cannot be read, or are of another autoencoder.
    """
    if isinstance(config, PretrainedAutoencoder):
        return {} if config.folder is None else _load_autoencoder_params(config.folder, config.model)
    if not (folder / WEIGHTS_FILE).is_file():
        raise MissingError(f"{folder} has no trained autoencoder yet; continue its training with: {command}")
    return load_weights(folder / WEIGHTS_FILE, like=get_param_shapes(config.model.make))


def _load_autoencoder_params(folder: str, expected: AutoencoderConfig) -> dict[str, Any]:
    if is_pipeline_folder(folder):
        config = read_pipeline_config(folder).autoencoder
        params = load_weights(Path(folder) / AUTOENCODER, like=get_param_shapes(config.make))
    else:
        config, params = load_autoencoder(folder)
    if difference := describe_difference(config, expected):
        raise UserError(f"{folder} holds another autoencoder than the config's: {difference}")
    return params


def make_autoencoder_step(
    training: AutoencoderTraining, seed: int, *, mesh: AnyMesh | None = None
) -> tuple[TrainStep, tuple[Any, ...]]:
    """Return the step of an autoencoder's training, and its constants: the weights of LPIPS if it is used.

    The state is sharded on the mesh; None is for a single device.

    Raises:
      MissingError: If the file of the LPIPS weights does not exist.
      UserError: If the file holds other weights.
    """
    objective, file = training.loss, training.loss.lpips_weights
    loss = AutoencoderLoss(
        graph=get_graph_def(training.model.make),
        objective=objective,
        latents=training.model.make_loss(objective, training.optimizer.is_trained),
        seed=seed,
        perceptual_net=None if file is None else get_graph_def(lambda rngs: Lpips(rngs=rngs)),
        optimizer=training.optimizer,
    )
    optimizer = make_optimizer(training.optimizer, steps=training.steps, mesh=mesh)
    step = AutoencoderStep(loss=loss, optimizer=optimizer, ema_decay=training.ema_decay, mesh=mesh)
    constants = () if file is None else (load_lpips(file),)
    if objective.adversarial is None:
        return step, constants
    discriminator = DiscriminatorTraining(
        config=objective.adversarial,
        last_layer=training.model.last_layer,
        random_key=rng.key(seed, "discriminator"),
    )
    return AdversarialStep(autoencoder=step, discriminator=discriminator), constants
