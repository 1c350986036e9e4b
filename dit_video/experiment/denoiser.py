"""Training of a model's denoiser: its trained part, its loss, its step, and its checkpoints."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Shaped

from dit_video.core.errors import UserError
from dit_video.core.trees import flatten, map_with_path, unflatten
from dit_video.distributed import make_shardings
from dit_video.distributed.mesh import AnyMesh
from dit_video.experiment.initial_weights import (
    ParameterPlacer,
    check_initial_weights,
    get_kernel_dtype,
    load_initial_denoiser,
    record_identity,
)
from dit_video.experiment.training_config import DenoiserTraining, LoraAdapters, Student, TemporalWeights
from dit_video.families import load_denoiser
from dit_video.models.model_config import ModelConfig
from dit_video.nn import (
    ONE_DEVICE,
    LoraConfig,
    Partitioner,
    add_lora_scale,
    attach_lora,
    get_graph_def,
    init_lora,
    init_params,
    merge_lora,
)
from dit_video.training.checkpoint import Checkpoints
from dit_video.training.losses.auxiliary import init_heads, make_terms, split_heads
from dit_video.training.losses.denoiser import TEMPORAL_PATHS, DenoiserLoss, LoraLoss, time_quantile
from dit_video.training.losses.distillation import make_distillation_step
from dit_video.training.optim.ema import DECAY, EmaSnapshots, format_average_name
from dit_video.training.optim.optimizer import OptimizerConfig
from dit_video.training.state import get_shapes_on_devices, make_on_devices
from dit_video.training.step import GradientStep, TrainStep
from dit_video.weights.parameter import Placement, place_on_host


class TrainableDenoiser(NamedTuple):
    """Trained part of a denoiser and its text encoder: all their weights, or adapters to pretrained weights.

    The trained parameters have those of auxiliary losses' heads besides, which no model has.
    """

    init: Callable[[Array], dict[str, Any]]
    """Initialises the trained parameters from a random key."""
    load_initial: Callable[[Array], dict[str, Any]] | None = None
    """Reads the initial weights, sharded over the devices; nothing else holds them. The key is that of `init`."""
    base_params: dict[str, Any] | None = None
    """Weights that the adapters change, sharded over the devices."""
    lora: LoraConfig | None = None
    teacher: dict[str, Any] | None = None
    """Weights that a student with weights of its own learns from, sharded over the devices; those of a student with
    adapters are `base_params`."""

    @property
    def frozen_params(self) -> dict[str, Any] | None:
        """Return the weights that the step reads and does not change, if there are any."""
        return self.teacher if self.base_params is None else self.base_params

    def get_adapter(self, trained: dict[str, Any]) -> dict[str, Any] | None:
        """Return the trained adapter; None where weights were trained."""
        return None if self.lora is None else add_lora_scale(split_heads(trained)[0], self.lora.scale)

    def attach_params(self, trained: dict[str, Any]) -> dict[str, Any]:
        """Return the model's parameters with an adapter attached: nothing is copied, and a model computes with them."""
        adapter = self.get_adapter(trained)
        return split_heads(trained)[0] if adapter is None else attach_lora(self.base_params or {}, adapter)

    def merge_params(self, trained: dict[str, Any]) -> dict[str, Any]:
        """Return the model's parameters, with an adapter merged, where it is on devices, into one after the other."""
        adapter = self.get_adapter(trained)
        if adapter is None:
            return split_heads(trained)[0]
        factors = flatten(adapter)

        def merge_leaf(path: str, leaf: Array) -> Array:
            if f"{path}/a" not in factors:
                return leaf
            module_factors = {f"kernel/{part}": factors[f"{path}/{part}"] for part in ("a", "b", "scale")}
            merge = jax.jit(merge_lora, out_shardings={"kernel": leaf.sharding})
            return merge({"kernel": leaf}, unflatten(module_factors))["kernel"]

        return map_with_path(merge_leaf, self.base_params)


def init_denoiser(model: ModelConfig, key: Array) -> dict[str, Any]:
    """Return random parameters of a model's denoiser and text encoder. Traceable."""
    return {
        "backbone": init_params(model.backbone.make, jax.random.fold_in(key, 0)),
        "text": init_params(model.text_encoder.make, jax.random.fold_in(key, 1)),
    }


def make_init(training: DenoiserTraining, model: ModelConfig) -> Callable[[Array], dict[str, Any]]:
    """Return the traceable function from a random key to all that a training trains: weights or adapters, and heads."""
    init = functools.partial(init_denoiser, model)
    if (lora := training.lora) is not None:
        shapes = jax.eval_shape(init, jax.random.key(0))
        init = functools.partial(init_lora, shapes, lora)
    return lambda key: init(key) | init_heads(training.auxiliary, model.backbone, key)


def open_trainable_denoiser(
    training: DenoiserTraining, model: ModelConfig, folder: Path, mesh: Mesh, *, is_resuming: bool
) -> TrainableDenoiser:
    """Return the trained part of a model's denoiser; `is_resuming` is True if `folder` has checkpoints already.

    Pretrained weights are read one parameter at a time, to their devices on `mesh`.

    Raises:
      MissingError: If the folder of the initial weights does not exist.
      UserError: If the folder holds no denoiser or one of another model, or if base or teacher weights are others than
        before.
    """
    init, train = make_init(training, model), training.train
    check_initial_weights(training, model, is_resuming=is_resuming)
    placer = ParameterPlacer(mesh, training, model.backbone)
    if isinstance(train, LoraAdapters | Student):
        params = load_initial_denoiser(model, train.init_from, placer, jax.random.key(0))
        record_identity(folder / "start.json", placer.identity, train.init_from)
        if train.lora is None:
            return TrainableDenoiser(init, load_initial=lambda key: jax.tree.map(jnp.copy, params), teacher=params)
        return TrainableDenoiser(init, base_params=params, lora=train.lora)
    if (start := train.init_from) is None or is_resuming:
        return TrainableDenoiser(init)

    def load_initial(key: Array) -> dict[str, Any]:
        heads = functools.partial(init_heads, training.auxiliary, model.backbone)
        own = make_on_devices(heads, key, shardings=functools.partial(make_shardings, mesh=mesh))
        return load_initial_denoiser(model, start, placer, key) | own

    return TrainableDenoiser(init, load_initial=load_initial)


def make_denoiser_loss(
    training: DenoiserTraining,
    model: ModelConfig,
    partitioner: Partitioner,
    *,
    seed: int,
    empty_caption: Shaped[np.ndarray, "s *E"],
    start_step: int = 0,
) -> DenoiserLoss:
    """Return the loss of the training of a model's denoiser.

    Args:
      training: The training.
      model: The model, as this training has it.
      partitioner: Attention and sharding of weights that the denoiser is made with.
      seed: Seed of the run.
      empty_caption: Tokens of an empty caption, or their embeddings.
      start_step: Number of steps of earlier stages.
    """
    terms = make_terms(training.auxiliary, model.backbone, partitioner, steps=training.steps, start_step=start_step)
    return DenoiserLoss(
        backbone=get_graph_def(model.backbone.make, partitioner),
        text_encoder=get_graph_def(model.text_encoder.make),
        objective=training.make_objective(model),
        caption_dropout=training.caption_dropout,
        empty_caption=empty_caption,
        seed=seed,
        frame_conditioning=model.frame_conditioning,
        time_quantiles=get_time_range(training, model),
        time_per=training.time_per,
        optimizer=get_optimizer_config(training) if training.lora is None else None,
        auxiliary=terms,
    )


def get_time_range(training: DenoiserTraining, model: ModelConfig) -> tuple[float, float]:
    """Return the range of quantiles of the objective's times that is trained; see `DenoiserLoss.time_quantiles`."""
    if training.expert is None:
        return 0.0, 1.0
    boundary = time_quantile(training.make_objective(model), training.expert.boundary)
    return (boundary, 1.0) if training.expert.expert == "high" else (0.0, boundary)


def add_other_expert(
    training: DenoiserTraining, model: ModelConfig, params: dict[str, Any], place: Placement = place_on_host
) -> dict[str, Any]:
    """Return a pipeline's parameters from the trained ones; the other of two experts is read to its destination."""
    if (expert_config := training.expert) is None:
        return params
    trained, kept = get_expert_names(training)
    _, other = load_denoiser(
        expert_config.other_folder,
        kernel_dtype=get_kernel_dtype(training, model.backbone),
        place=lambda path, parameter: place(f"{kept}/{path}", parameter),
    )
    return {trained: params["backbone"], kept: other, "text": params["text"]}


def get_expert_names(training: DenoiserTraining) -> tuple[str, str]:
    """Return a pipeline's names of the trained expert and of the other one."""
    low = training.expert is not None and training.expert.expert == "low"
    return ("low_noise", "backbone") if low else ("backbone", "low_noise")


def get_optimizer_config(training: DenoiserTraining) -> OptimizerConfig:
    """Return the optimizer's config, restricted to the parameters that `training.train` names."""
    if not isinstance(training.train, TemporalWeights):
        return training.optimizer
    return dataclasses.replace(training.optimizer, trainable=(TEMPORAL_PATHS,))


def make_denoiser_step(
    config: DenoiserTraining, loss: DenoiserLoss, *, start_step: int = 0, mesh: AnyMesh | None = None
) -> TrainStep:
    """Return the step of a denoiser's training, from the loss of its parameters.

    Adapted weights, or a teacher's, are the last constant of the step.

    Args:
      config: The training.
      loss: Loss of the model's parameters.
      start_step: Number of steps of earlier stages.
      mesh: Mesh that the state is sharded on; None for a single device.
    """
    optimizer = get_optimizer_config(config).make(steps=config.steps, start_step=start_step, mesh=mesh)
    if isinstance(config.train, Student):
        scale = None if config.lora is None else config.lora.scale
        options: dict[str, Any] = {"ema_decay": config.ema_decay, "averages": config.averages, "lora_scale": scale}
        return make_distillation_step(config.train.distillation, loss, optimizer, **options)
    return GradientStep(
        loss=loss if config.lora is None else LoraLoss(loss=loss, scale=config.lora.scale),
        optimizer=optimizer,
        ema_decay=config.ema_decay,
        averages=config.averages,
        accumulation_steps=config.accumulation_steps,
        mesh=mesh,
    )


def load_checkpoint(
    checkpoints: Checkpoints,
    training: DenoiserTraining,
    model: ModelConfig,
    folder: Path,
    mesh: Mesh,
    *,
    step: int | None = None,
    ema: float | int | None = None,
    sigma_rel: float | None = None,
) -> dict[str, Any]:
    """Return the parameters of a model's denoiser in a checkpoint; see `Run.newest_pipeline`.

    Args:
      checkpoints: The checkpoints.
      training: The training that made them.
      model: The model.
      folder: Folder of the training.
      mesh: Devices that the weights are read to.
      step: Step of the checkpoint; None for the newest that can be read.
      ema: Decay of the average; 0 for the weights themselves, None for the average that is sampled from.
      sigma_rel: Relative width of an average that is reconstructed from snapshots.
    """
    trained = open_trainable_denoiser(training, model, folder, mesh, is_resuming=True)
    loss = make_denoiser_loss(training, model, ONE_DEVICE, seed=0, empty_caption=np.zeros(1, np.int32))
    train_step = make_denoiser_step(training, loss)  # all stages share one state
    make_state_shardings = functools.partial(make_shardings, mesh=mesh)
    shapes = get_shapes_on_devices(lambda key: train_step.init(trained.init(key)), shardings=make_state_shardings)
    state, _ = checkpoints.restore(shapes, step)
    chosen = select_average(state, training, folder, ema=ema, sigma_rel=sigma_rel)
    del state
    return trained.merge_params(chosen)


def select_average(
    state: Any, config: DenoiserTraining, folder: Path, *, ema: float | int | None, sigma_rel: float | None
) -> dict[str, Any]:
    """Return the requested average of a training's weights, on its devices.

    Args:
      state: The newest state.
      config: Names the averages that it has.
      folder: Folder of its snapshots.
      ema: A decay; 0 for the weights without an average; None for the average that is sampled from.
      sigma_rel: Relative width of an average that is reconstructed from snapshots instead.

    Raises:
      MissingError: If there are no snapshots.
      UserError: If the decay was not kept, or if both are given.
    """
    if ema is not None and sigma_rel is not None:
        raise UserError("ema and sigma_rel are both given: an average has a decay or a width; give ema or sigma_rel")
    if sigma_rel is not None:
        shapes, arrays = jax.eval_shape(lambda: state.params), flatten(state.params)
        return EmaSnapshots(folder / "snapshots").reconstruct(
            sigma_rel,
            like=shapes,
            max_step=int(state.step),
            place=lambda path, parameter: parameter.to_device(arrays[path].sharding),
        )
    if ema is None or ema == config.ema_decay:
        return state.ema
    if ema == 0:
        return state.params
    if ema not in config.averages.decays:
        kept_decays = ", ".join(map(str, (config.ema_decay, *config.averages.decays)))
        raise UserError(f"the run keeps no average of decay {ema}; use {kept_decays}, or 0 for the weights themselves")
    return state.averages[DECAY][format_average_name(ema)]
