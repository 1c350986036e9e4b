"""What trainings start with: an autoencoder's loss, and weights that were given."""

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
from dit_video.backbones.wan import WanDitConfig
from dit_video.core import config_json, rng
from dit_video.core.errors import UserError
from dit_video.core.files import read_json, write_json
from dit_video.core.trees import flatten, map_with_path, unflatten
from dit_video.distributed import over_devices, shardings
from dit_video.distributed.mesh import AnyMesh
from dit_video.experiment import AutoencoderTraining, DenoiserTraining, Experiment, GivenAutoencoder
from dit_video.families import denoiser_config, load_autoencoder, load_denoiser
from dit_video.features import Lpips
from dit_video.nn import LoraConfig, graph_of, init_lora, init_params, merge_lora, scaled
from dit_video.pipelines.pipeline import CONFIG as PIPELINE
from dit_video.pipelines.pipeline import load_pipeline
from dit_video.text import FrozenTextConfig
from dit_video.training.losses.adversarial import Rival
from dit_video.training.losses.autoencoder import AutoencoderLoss
from dit_video.training.losses.denoiser import TEMPORAL, DenoiserLoss, share_below
from dit_video.training.losses.lora import LoraLoss
from dit_video.training.losses.vq import VqLoss
from dit_video.training.optim.optimizer import OptimizerConfig
from dit_video.training.step import Loss, OwnStep
from dit_video.weights import clip_vision_config, load_lpips
from dit_video.weights.parameter import Parameter

_OF_TRAINING = ("bfloat16", "std", "attention", "dtype", "remat", "folder", "identity")
"""Fields of configs that weights do not depend on, so that their files do not hold them."""
_EMBEDDING = "dit/embed/kernel"


def given_params(training: AutoencoderTraining, key: Array) -> dict[str, Any] | None:
    """The parameters of `training.model` out of the folder `training.start`; None where there is none.

    An image autoencoder's are inflated where the model is an inflated one; `key` is for its temporal layers.

    Raises:
      MissingError: no such folder, or files that it lacks.
      UserError: a folder whose weights can't be read, or are of another autoencoder.
    """
    if training.start is None:
        return None
    model = training.model
    if not isinstance(model, InflatedConfig):
        return _autoencoder_params(training.start, model)
    return inflate(model.image, _autoencoder_params(training.start, model.image), key, span=model.span)[1]


def given_autoencoder(given: GivenAutoencoder) -> dict[str, Any]:
    """The parameters of an autoencoder that is not trained.

    Raises:
      MissingError: no such folder, or files that it lacks.
      UserError: a folder whose weights can't be read, or are of another autoencoder.
    """
    return _autoencoder_params(given.folder, given.model)


def _autoencoder_params(folder: str, wanted: Any) -> dict[str, Any]:
    if (Path(folder) / PIPELINE).is_file():
        codec = load_pipeline(folder).codec
        config, params = codec.config, codec.params
    else:
        config, params = load_autoencoder(folder)
    if difference := config_json.difference(_kept(config_json.to_json(config)), _kept(config_json.to_json(wanted))):
        raise UserError(f"{folder} holds another autoencoder than the config's: {difference}")
    return params


def loss_parts(training: AutoencoderTraining, seed: int) -> dict[str, Any]:
    """The loss of an autoencoder's training, with its judge and its rival: arguments of `Training`.

    Raises:
      MissingError: no such file of LPIPS's weights.
      UserError: a file that holds others.
    """
    objective, file = training.loss, training.loss.lpips_weights
    arguments: dict[str, Any] = {
        "graph": graph_of(training.model.make),
        "objective": objective,
        "seed": seed,
        "judge": None if file is None else graph_of(lambda rngs: Lpips(rngs=rngs)),
        "optimizer": training.optimizer,
    }
    if isinstance(training.model, VqConfig):
        loss: AutoencoderLoss = VqLoss(learning=training.codebook, **arguments)
    else:
        loss = AutoencoderLoss(**arguments)
    rival = objective.adversarial and Rival(
        config=objective.adversarial,
        last_layer=training.model.last_layer,
        random_key=rng.key(seed, "discriminator"),
    )
    return {"loss": loss, "constants": () if file is None else (load_lpips(file),), "rival": rival}


class TrainedDenoiser(NamedTuple):
    """What is trained of a denoiser and its text encoder: weights of them, or adapters to what was given."""

    init: Callable[[Array], dict[str, Any]]
    """what is trained, from a random key"""
    start: Callable[[], dict[str, Any]] | None = None
    """reads the weights that training begins with, laid out on the devices; nothing else holds them"""
    adapted: dict[str, Any] | None = None
    """the weights that adapters change, laid out on the devices"""
    lora: LoraConfig | None = None
    teacher: dict[str, Any] | None = None
    """the weights that a student learns from, laid out on the devices"""

    def loss(self, loss: Loss | OwnStep) -> Loss | OwnStep:
        """Of what is trained, from that of the model's parameters."""
        return loss if self.lora is None or isinstance(loss, OwnStep) else LoraLoss(loss=loss, scale=self.lora.scale)

    def arguments(self) -> dict[str, Any]:
        """Of `Training`."""
        return {"start": self.start, "frozen": self.teacher if self.adapted is None else self.adapted}

    def adapter(self, trained: dict[str, Any]) -> dict[str, Any] | None:
        """The adapter that was trained; None where weights were."""
        return None if self.lora is None else scaled(trained, self.lora.scale)

    def whole(self, trained: dict[str, Any]) -> dict[str, Any]:
        """The model's parameters on the host, an adapter merged into those that it adapts, one after the other."""
        adapter = self.adapter(trained)
        if adapter is None:
            return trained
        factors = flatten(adapter)

        def merged(path: str, leaf: Array) -> np.ndarray:
            kernel = jax.device_get(leaf)
            if f"{path}/a" not in factors:
                return kernel
            own = {f"kernel/{part}": factors[f"{path}/{part}"] for part in ("a", "b", "scale")}
            return np.asarray(merge_lora({"kernel": kernel}, unflatten(own))["kernel"])

        return map_with_path(merged, self.adapted)


def init_denoiser(training: DenoiserTraining, key: Array) -> dict[str, Any]:
    """Random parameters of a denoiser and its text encoder. Traceable."""
    return {
        "dit": init_params(training.dit.make, jax.random.fold_in(key, 0)),
        "text": init_params(training.text.make, jax.random.fold_in(key, 1)),
    }


def trained_denoiser(training: DenoiserTraining, folder: Path, mesh: Mesh, *, continues: bool) -> TrainedDenoiser:
    """What is trained, in `folder`, where there are checkpoints already or not.

    Weights that were given are read one parameter at a time to where they are used, on `mesh`.

    Raises:
      MissingError: no such folder as `training.start`.
      UserError: one that holds no denoiser, or one of another model; other weights than those that adapters were
        trained for, or that were distilled, before.
    """
    init = functools.partial(init_denoiser, training)
    check_start(training)
    if training.lora is not None or training.distillation is not None:
        placing = _Placing(mesh, training)
        params = _given_denoiser(training, placing)
        _keep_identity(folder / "start.json", placing.identity, str(training.start))
    if training.distillation is not None:
        return TrainedDenoiser(init, start=lambda: jax.tree.map(jnp.copy, params), teacher=params)
    if training.lora is not None:
        lora = training.lora
        shapes = jax.eval_shape(init, jax.random.key(0))
        return TrainedDenoiser(lambda key: init_lora(shapes, lora, key), adapted=params, lora=lora)
    if training.start is None or training.trained == "scratch" or continues:
        return TrainedDenoiser(init)
    return TrainedDenoiser(init, start=lambda: _given_denoiser(training, _Placing(mesh, training)))


def denoiser_loss(experiment: Experiment, mesh: AnyMesh, *, empty: Shaped[np.ndarray, "s *E"]) -> DenoiserLoss:
    """What the denoiser's training minimises, its attention being spread over a mesh.

    Args:
      experiment: of the training.
      mesh: that it is computed on.
      empty: the tokens of an empty caption, or their embeddings.
    """
    config = experiment.denoiser
    return DenoiserLoss(
        dit=graph_of(over_devices(config.dit.make, mesh, experiment.mesh.context_attention)),
        text=graph_of(config.text.make),
        objective=config.objective,
        caption_dropout=config.caption_dropout,
        empty_caption=empty,
        seed=experiment.seed,
        known=config.known,
        shares=shares_of(config),
        times_of=config.times_of,
        optimizer=optimizer_of(config) if config.lora is None else None,
    )


def shares_of(training: DenoiserTraining) -> tuple[float, float]:
    """Which of the objective's times are trained, as `DenoiserLoss.shares`: of one of two experts its own."""
    if training.expert is None:
        return 0.0, 1.0
    boundary = share_below(training.objective, training.expert.boundary)
    return (boundary, 1.0) if training.expert.expert == "high" else (0.0, boundary)


def with_other(training: DenoiserTraining, params: dict[str, Any]) -> dict[str, Any]:
    """A pipeline's parameters from the trained ones: of one of two experts with the other, read to the host."""
    if (one := training.expert) is None:
        return params
    trained, kept = experts_of(training)
    other = load_denoiser(one.other, kernels=_kernels(training))[1]
    return {trained: params["dit"], kept: other, "text": params["text"]}


def experts_of(training: DenoiserTraining) -> tuple[str, str]:
    """What a pipeline calls the expert that is trained, and the other."""
    low = training.expert is not None and training.expert.expert == "low"
    return ("low_noise", "dit") if low else ("dit", "low_noise")


def optimizer_of(training: DenoiserTraining) -> OptimizerConfig:
    """The optimizer, with what `training.trained` says of the parameters that it trains."""
    if training.trained != "temporal":
        return training.optimizer
    return dataclasses.replace(training.optimizer, trainable=(TEMPORAL,))


def check_start(training: DenoiserTraining) -> None:
    """A quick look at what is trained, without weights.

    Raises:
      MissingError: no such folder as `training.start`.
      UserError: a folder of weights of another model, or no layers in time where these are trained.
    """
    if training.trained == "temporal":
        paths = flatten(jax.eval_shape(lambda key: init_params(training.dit.make, key), jax.random.key(0)))
        if not any(re.search(TEMPORAL, path) for path in paths):
            raise UserError(
                "the denoiser has no layers in time alone, so that trained='temporal' would train nothing; train it "
                "whole, or with lora"
            )
    if training.start is not None and training.trained != "scratch" and (folder := _foreign(training.start)):
        _check_same(str(folder), "the transformer", denoiser_config(folder), training.dit)
        if training.expert is not None:
            other = training.expert.other
            _check_same(other, "the transformer", denoiser_config(other), training.dit)
        if not isinstance(training.text, FrozenTextConfig):
            raise UserError(f"{training.start} has no text encoder to train on; give text=FrozenTextConfig(...)")
    targets = () if training.lora is None or not isinstance(training.dit, WanDitConfig) else training.lora.targets
    if any(re.search(pattern, _EMBEDDING) for pattern in targets):
        raise UserError(
            f"adapters of {_EMBEDDING} can't be written for other programs; use targets that leave it out, such as "
            "blocks/.*kernel$"
        )


def check_image_encoder(training: DenoiserTraining, kept: Path) -> None:
    """That a training's image encoder, if it has one, makes tokens of the width that the denoiser reads.

    Its weights are not read, nor its folder once its identity is kept.

    Raises:
      MissingError: no encoder there.
      UserError: it has another width.
    """
    folder, width = training.image_encoder, getattr(training.dit, "image_width", None)
    if folder is not None and not kept.is_file() and (found := clip_vision_config(folder).width) != width:
        raise UserError(
            f"the image encoder in {folder} makes tokens of width {found}, the denoiser reads {width}; set dit "
            f"image_width={found}, or name another folder"
        )


def _given_denoiser(training: DenoiserTraining, placing: "_Placing") -> dict[str, Any]:
    """The parameters that training starts from, each placed as soon as it is read."""
    assert training.start is not None
    if folder := _foreign(training.start):
        kernels = placing.kernels
        placed = load_denoiser(folder, kernels=kernels, place=lambda path, each: placing(f"dit/{path}", each))[1]
        return {"dit": placed, "text": {}}
    folder = Path(training.start)
    pipeline = load_pipeline(folder if (folder / PIPELINE).is_file() else folder / "pipeline")
    for part in ("dit", "text"):
        _check_same(str(folder), part, getattr(pipeline.config, part), getattr(training, part))
    return map_with_path(lambda path, leaf: placing(path, Parameter.of(leaf)), pipeline.denoiser_params)


def _check_same(folder: str, part: str, found: Any, wanted: Any) -> None:
    if difference := config_json.difference(*(_kept(config_json.to_json(config)) for config in (found, wanted))):
        raise UserError(f"{folder} holds another denoiser than the config's, in {part}: {difference}")


def _foreign(start: str) -> Path | None:
    """The folder of the transformer, where a folder is in diffusers' layout: a pipeline's, or the transformer's own."""
    folder = Path(start)
    if (folder / "model_index.json").is_file():
        return folder / "transformer"
    return folder if (folder / "config.json").is_file() else None


def _kernels(training: DenoiserTraining) -> np.dtype:
    """What the kernels of linear maps are read in.

    Where adapters alone are trained, Wan's are kept in the dtype of its matrix products: half the memory in bfloat16.
    """
    adapts_wan = training.lora is not None and isinstance(training.dit, WanDitConfig)
    return jnp.dtype(training.dit.dtype if adapts_wan else "float32")


class _Placing:
    """Puts each parameter to its place on a mesh, and takes note of what it was."""

    def __init__(self, mesh: Mesh, training: DenoiserTraining):
        self._mesh, self._digests = mesh, dict[str, str]()
        self.kernels = _kernels(training)

    def __call__(self, path: str, parameter: Parameter) -> Array:
        wanted = self.kernels if path.endswith("kernel") else np.dtype(np.float32)
        digest = hashlib.sha256()

        def noted() -> Iterator[np.ndarray]:
            for piece in parameter.pieces():
                leaf = np.ascontiguousarray(piece.astype(wanted, copy=False))
                digest.update(leaf.reshape(-1).view(np.uint8).data)
                yield leaf

        placed = Parameter(parameter.shape, wanted, noted).on(shardings({path: parameter}, self._mesh)[path])
        self._digests[path] = digest.hexdigest()
        return placed

    @functools.cached_property
    def identity(self) -> str:
        """Of all parameters that were placed."""
        return hashlib.sha256(repr(sorted(self._digests.items())).encode()).hexdigest()[:16]


def _keep_identity(path: Path, identity: str, start: str) -> None:
    """Write down what is adapted; refuse to go on with something else."""
    if path.is_file() and (before := read_json(path).get("identity")) != identity:
        raise UserError(f"{start} has other weights ({identity}) than before ({before}); put them back")
    if jax.process_index() == 0 and not path.is_file():
        write_json(path, {"start": start, "identity": identity})


def _kept(config: Any) -> Any:
    """A config as JSON, without what only training knows."""
    if not isinstance(config, dict):
        return config
    return {name: _kept(value) for name, value in config.items() if name not in _OF_TRAINING}
