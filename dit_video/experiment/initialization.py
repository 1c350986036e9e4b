"""Initialization of trainings: an autoencoder's loss, and weights that training starts from."""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Shaped

from dit_video.autoencoders import InflatedConfig, VqConfig, inflate
from dit_video.core import config_json, rng
from dit_video.core.errors import UserError
from dit_video.core.files import read_json, write_json
from dit_video.core.trees import flatten, map_with_path, unflatten
from dit_video.distributed import make_shardings, shard_model
from dit_video.distributed.mesh import AnyMesh
from dit_video.experiment import AutoencoderTraining, DenoiserTraining, Experiment, PretrainedAutoencoder
from dit_video.families import find_format, load_autoencoder, load_denoiser, read_denoiser_config
from dit_video.features import Lpips
from dit_video.nn import LoraConfig, add_lora_scale, get_graph_def, init_lora, init_params, merge_lora
from dit_video.pipelines.folder import is_pipeline_folder
from dit_video.pipelines.pipeline import load_pipeline
from dit_video.text import FrozenTextConfig
from dit_video.training.losses.adversarial import DiscriminatorTraining
from dit_video.training.losses.autoencoder import AutoencoderLoss
from dit_video.training.losses.denoiser import TEMPORAL_PATHS, DenoiserLoss, time_quantile
from dit_video.training.losses.lora import LoraLoss
from dit_video.training.losses.vq import VqLoss
from dit_video.training.optim.optimizer import OptimizerConfig
from dit_video.training.step import Loss, OwnStep
from dit_video.weights import load_lpips, read_clip_vision_config
from dit_video.weights.parameter import Parameter

_TRAINING_ONLY_FIELDS = ("bfloat16", "std", "attention", "dtype", "remat", "folder", "identity")
"""Fields of configs that weights do not depend on, so that their files do not hold them."""


def load_initial_params(training: AutoencoderTraining, key: Array) -> dict[str, Any] | None:
    """Load the parameters of `training.model` from the folder `training.init_from`; None without a folder.

    An image autoencoder is inflated where the model is an inflated one; `key` initialises its temporal layers.

    Raises:
      MissingError: the folder does not exist, or lacks files.
      UserError: weights that cannot be read, or of another autoencoder.
    """
    if training.init_from is None:
        return None
    model = training.model
    if not isinstance(model, InflatedConfig):
        return _load_autoencoder_params(training.init_from, model)
    params = _load_autoencoder_params(training.init_from, model.image)
    return inflate(model.image, params, key, kernel_size=model.kernel_size)[1]


def load_pretrained_autoencoder(config: PretrainedAutoencoder) -> dict[str, Any]:
    """Load the parameters of a pretrained autoencoder.

    Raises:
      MissingError: the folder does not exist, or lacks files.
      UserError: weights that cannot be read, or of another autoencoder.
    """
    return _load_autoencoder_params(config.folder, config.model)


def _load_autoencoder_params(folder: str, expected: Any) -> dict[str, Any]:
    if is_pipeline_folder(folder):
        codec = load_pipeline(folder).codec
        config, params = codec.config, codec.params
    else:
        config, params = load_autoencoder(folder)
    if difference := _describe_difference(config, expected):
        raise UserError(f"{folder} holds another autoencoder than the config's: {difference}")
    return params


def make_autoencoder_loss(training: AutoencoderTraining, seed: int) -> dict[str, Any]:
    """Return the loss of an autoencoder's training, with its networks, as arguments of `Training`.

    Raises:
      MissingError: the file of the LPIPS weights does not exist.
      UserError: the file holds other weights.
    """
    objective, file = training.loss, training.loss.lpips_weights
    arguments: dict[str, Any] = {
        "graph": get_graph_def(training.model.make),
        "objective": objective,
        "seed": seed,
        "perceptual_net": None if file is None else get_graph_def(lambda rngs: Lpips(rngs=rngs)),
        "optimizer": training.optimizer,
    }
    is_quantized = isinstance(training.model, VqConfig)
    loss = VqLoss(learning=training.codebook, **arguments) if is_quantized else AutoencoderLoss(**arguments)
    discriminator = objective.adversarial and DiscriminatorTraining(
        config=objective.adversarial,
        last_layer=training.model.last_layer,
        random_key=rng.key(seed, "discriminator"),
    )
    return {"loss": loss, "constants": () if file is None else (load_lpips(file),), "discriminator": discriminator}


class TrainableDenoiser(NamedTuple):
    """Trained part of a denoiser and its text encoder: all their weights, or adapters to pretrained weights."""

    init: Callable[[Array], dict[str, Any]]
    """Initialises the trained parameters from a random key."""
    load_initial: Callable[[], dict[str, Any]] | None = None
    """Reads the initial weights, sharded over the devices; nothing else holds them."""
    base_params: dict[str, Any] | None = None
    """Weights that the adapters change, sharded over the devices."""
    lora: LoraConfig | None = None
    teacher: dict[str, Any] | None = None
    """Weights that a student learns from, sharded over the devices."""

    def wrap_loss(self, loss: Loss | OwnStep) -> Loss | OwnStep:
        """Return the loss of the trained parameters, from that of the model's parameters."""
        return loss if self.lora is None or isinstance(loss, OwnStep) else LoraLoss(loss=loss, scale=self.lora.scale)

    def make_training_arguments(self) -> dict[str, Any]:
        """Return arguments of `Training`."""
        frozen = self.teacher if self.base_params is None else self.base_params
        return {"load_params": self.load_initial, "frozen_params": frozen}

    def get_adapter(self, trained: dict[str, Any]) -> dict[str, Any] | None:
        """Return the trained adapter; None where weights were trained."""
        return None if self.lora is None else add_lora_scale(trained, self.lora.scale)

    def merge_params(self, trained: dict[str, Any]) -> dict[str, Any]:
        """Return the model's parameters on the host, with an adapter merged into one parameter after the other."""
        adapter = self.get_adapter(trained)
        if adapter is None:
            return trained
        factors = flatten(adapter)

        def merge_leaf(path: str, leaf: Array) -> np.ndarray:
            kernel = jax.device_get(leaf)
            if f"{path}/a" not in factors:
                return kernel
            module_factors = {f"kernel/{part}": factors[f"{path}/{part}"] for part in ("a", "b", "scale")}
            return np.asarray(merge_lora({"kernel": kernel}, unflatten(module_factors))["kernel"])

        return map_with_path(merge_leaf, self.base_params)


def init_denoiser(training: DenoiserTraining, key: Array) -> dict[str, Any]:
    """Return random parameters of a denoiser and its text encoder. Traceable."""
    return {
        "dit": init_params(training.dit.make, jax.random.fold_in(key, 0)),
        "text": init_params(training.text.make, jax.random.fold_in(key, 1)),
    }


def open_trainable_denoiser(
    training: DenoiserTraining, folder: Path, mesh: Mesh, *, is_resuming: bool
) -> TrainableDenoiser:
    """Return the trained part of the denoiser; `is_resuming` is True if `folder` has checkpoints already.

    Pretrained weights are read one parameter at a time, to their devices on `mesh`.

    Raises:
      MissingError: `training.init_from` does not exist.
      UserError: a folder that holds no denoiser, or one of another model; other base or teacher weights than before.
    """
    init = functools.partial(init_denoiser, training)
    check_initial_weights(training)
    if training.lora is not None or training.distillation is not None:
        placing = _ParameterPlacer(mesh, training)
        params = _load_initial_denoiser(training, placing)
        _record_identity(folder / "start.json", placing.identity, str(training.init_from))
    if training.distillation is not None:
        return TrainableDenoiser(init, load_initial=lambda: jax.tree.map(jnp.copy, params), teacher=params)
    if (lora := training.lora) is not None:
        shapes = jax.eval_shape(init, jax.random.key(0))
        return TrainableDenoiser(lambda key: init_lora(shapes, lora, key), base_params=params, lora=lora)
    if training.init_from is None or training.train_mode == "scratch" or is_resuming:
        return TrainableDenoiser(init)
    placer = _ParameterPlacer(mesh, training)
    return TrainableDenoiser(init, load_initial=lambda: _load_initial_denoiser(training, placer))


def make_denoiser_loss(
    experiment: Experiment, mesh: AnyMesh, *, empty_caption: Shaped[np.ndarray, "s *E"]
) -> DenoiserLoss:
    """Return the loss of the denoiser's training, with its attention sharded over a mesh.

    Args:
      experiment: the experiment.
      mesh: the mesh that the loss is computed on.
      empty_caption: tokens of an empty caption, or their embeddings.
    """
    config = experiment.denoiser
    return DenoiserLoss(
        dit=get_graph_def(shard_model(config.dit.make, mesh, experiment.mesh.context_attention)),
        text=get_graph_def(config.text.make),
        objective=config.objective,
        caption_dropout=config.caption_dropout,
        empty_caption=empty_caption,
        seed=experiment.seed,
        frame_conditioning=config.frame_conditioning,
        time_quantiles=get_time_range(config),
        time_per=config.time_per,
        optimizer=get_optimizer_config(config) if config.lora is None else None,
    )


def get_time_range(training: DenoiserTraining) -> tuple[float, float]:
    """Return the range of the objective's times that is trained, as `DenoiserLoss.shares`."""
    if training.expert is None:
        return 0.0, 1.0
    boundary = time_quantile(training.objective, training.expert.boundary)
    return (boundary, 1.0) if training.expert.expert == "high" else (0.0, boundary)


def add_other_expert(training: DenoiserTraining, params: dict[str, Any]) -> dict[str, Any]:
    """Return a pipeline's parameters from the trained ones; the other of two experts is read to the host."""
    if (expert_config := training.expert) is None:
        return params
    trained, kept = get_expert_names(training)
    other = load_denoiser(expert_config.other_folder, kernel_dtype=_get_kernel_dtype(training))[1]
    return {trained: params["dit"], kept: other, "text": params["text"]}


def get_expert_names(training: DenoiserTraining) -> tuple[str, str]:
    """Return a pipeline's names of the trained expert and of the other one."""
    low = training.expert is not None and training.expert.expert == "low"
    return ("low_noise", "dit") if low else ("dit", "low_noise")


def get_optimizer_config(training: DenoiserTraining) -> OptimizerConfig:
    """Return the optimizer's config, restricted to the parameters that `training.train_mode` names."""
    if training.train_mode != "temporal":
        return training.optimizer
    return dataclasses.replace(training.optimizer, trainable=(TEMPORAL_PATHS,))


def check_initial_weights(training: DenoiserTraining) -> None:
    """Check the initial weights and the trained parameters, without reading weights.

    Raises:
      MissingError: `training.init_from` does not exist.
      UserError: a folder with weights of another model, or no temporal layers where only these are trained.
    """
    if training.train_mode == "temporal":
        paths = flatten(jax.eval_shape(lambda key: init_params(training.dit.make, key), jax.random.key(0)))
        if not any(re.search(TEMPORAL_PATHS, path) for path in paths):
            raise UserError("train_mode='temporal' is invalid: the denoiser has no temporal layers; use full, or lora")
    start = None if training.train_mode == "scratch" else training.init_from
    if start is not None and (folder := _find_transformer(start)):
        _check_same(str(folder), "the transformer", read_denoiser_config(folder), training.dit)
        if training.expert is not None:
            other = training.expert.other_folder
            _check_same(other, "the transformer", read_denoiser_config(other), training.dit)
        if not isinstance(training.text, FrozenTextConfig):
            raise UserError(f"{start} has no text encoder to train; set text=FrozenTextConfig(...)")
    denoiser_format = find_format(training.dit)
    targets = () if training.lora is None else training.lora.targets
    for path in () if denoiser_format is None else denoiser_format.unadapted:
        if any(re.search(pattern, path) for pattern in targets):
            fix = "use targets that exclude it, such as blocks/.*kernel$"
            raise UserError(f"adapters of {path} can't be written in other programs' formats; {fix}")


def check_image_encoder(training: DenoiserTraining, identity_file: Path) -> None:
    """Check that the image encoder, if there is one, makes tokens of the width that the denoiser reads.

    Its weights are not read, nor its folder once its identity is recorded.

    Raises:
      MissingError: there is no encoder in the folder.
      UserError: it has another width.
    """
    folder, width = training.image_encoder, training.dit.image_width
    if folder is None or identity_file.is_file():
        return
    if (encoder_width := read_clip_vision_config(folder).width) != width:
        raise UserError(
            f"the image encoder in {folder} makes tokens of width {encoder_width}, the denoiser reads {width}; set dit "
            f"image_width={encoder_width}, or name another folder"
        )


def _load_initial_denoiser(training: DenoiserTraining, placer: "_ParameterPlacer") -> dict[str, Any]:
    """Load the initial parameters, each to its devices as soon as it is read."""
    assert training.init_from is not None
    if folder := _find_transformer(training.init_from):
        kernels = placer.kernel_dtype
        params = load_denoiser(folder, kernel_dtype=kernels, place=lambda path, each: placer(f"dit/{path}", each))[1]
        return {"dit": params, "text": {}}
    folder = Path(training.init_from)
    pipeline = load_pipeline(folder if is_pipeline_folder(folder) else folder / "pipeline")
    for part in ("dit", "text"):
        _check_same(str(folder), part, getattr(pipeline.config, part), getattr(training, part))
    return map_with_path(lambda path, leaf: placer(path, Parameter.from_array(leaf)), pipeline.denoiser_params)


def _check_same(folder: str, part: str, actual: Any, expected: Any) -> None:
    if difference := _describe_difference(actual, expected):
        raise UserError(f"{folder} holds another denoiser than the config's, in {part}: {difference}")


def _find_transformer(start: str) -> Path | None:
    """Return the transformer's folder in a pipeline folder of diffusers, or in its own; None in other folders."""
    folder = Path(start)
    if (folder / "model_index.json").is_file():
        return folder / "transformer"
    return folder if (folder / "config.json").is_file() else None


def _get_kernel_dtype(training: DenoiserTraining) -> np.dtype:
    """Return the dtype that the kernels of linear maps are read in.

    Where only adapters are trained, kernels are kept in the dtype of the matrix products: half the memory in bfloat16.
    """
    return jnp.dtype("float32" if training.lora is None else training.dit.dtype)


class _ParameterPlacer:
    """Places parameters on a mesh, and records a digest of each."""

    def __init__(self, mesh: Mesh, training: DenoiserTraining):
        self._mesh, self._digests = mesh, dict[str, str]()
        self.kernel_dtype = _get_kernel_dtype(training)

    def __call__(self, path: str, parameter: Parameter) -> Array:
        target_dtype = self.kernel_dtype if path.endswith("kernel") else np.dtype(np.float32)
        digest = hashlib.sha256()

        def hashed_pieces() -> Iterator[np.ndarray]:
            for piece in parameter.read_chunks():
                leaf = np.ascontiguousarray(piece.astype(target_dtype, copy=False))
                digest.update(leaf.reshape(-1).view(np.uint8).data)
                yield leaf

        sharding = make_shardings({path: parameter}, self._mesh)[path]
        array = Parameter(parameter.shape, target_dtype, hashed_pieces).to_device(sharding)
        self._digests[path] = digest.hexdigest()
        return array

    @functools.cached_property
    def identity(self) -> str:
        """Return the identity of all parameters that were placed."""
        return hashlib.sha256(repr(sorted(self._digests.items())).encode()).hexdigest()[:16]


def _record_identity(path: Path, identity: str, start: str) -> None:
    """Record the identity of the initial weights; raise if it differs from the recorded one."""
    if path.is_file() and (before := read_json(path).get("identity")) != identity:
        raise UserError(f"{start} has other weights ({identity}) than before ({before}); put them back")
    if jax.process_index() == 0 and not path.is_file():
        write_json(path, {"start": start, "identity": identity})


def _describe_difference(actual: Any, expected: Any) -> str:
    """Describe where two models' configs differ in more than their training; empty if they do not."""
    configs = (_drop_training_fields(config_json.to_json(config)) for config in (actual, expected))
    return config_json.describe_difference(*configs)


def _drop_training_fields(config: Any) -> Any:
    """Return a config as JSON, without fields that only training uses."""
    if not isinstance(config, dict):
        return config
    return {name: _drop_training_fields(value) for name, value in config.items() if name not in _TRAINING_ONLY_FIELDS}
