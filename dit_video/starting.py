"""What trainings start with: an autoencoder's loss, and weights that were given."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from dit_video import configs, rng
from dit_video.autoencoder import InflatedConfig, VqConfig, inflate
from dit_video.errors import UserError
from dit_video.experiment import AutoencoderTraining, DenoiserTraining
from dit_video.features import Lpips
from dit_video.files import read_json, write_json
from dit_video.nn import LoraConfig, graph_of, init_lora, init_params, merge_lora, scaled
from dit_video.pipeline import CONFIG as PIPELINE
from dit_video.pipeline import load_pipeline
from dit_video.training.adversarial import Rival
from dit_video.training.autoencoder import AutoencoderLoss
from dit_video.training.lora import LoraLoss
from dit_video.training.step import Loss
from dit_video.training.vq import VqLoss
from dit_video.tree import flatten
from dit_video.weights import load_autoencoder, load_lpips

_OF_TRAINING = ("bfloat16", "std", "attention", "dtype", "remat", "folder", "identity")
"""Fields of configs that weights do not depend on, so that their files do not hold them."""


def given_params(training: AutoencoderTraining, key: Array) -> dict[str, Any] | None:
    """The parameters of `training.model` out of the folder `training.start`; None where there is none.

    An image autoencoder's are inflated where the model is an inflated one; `key` is for its temporal layers.

    Raises:
      MissingError: no such folder, or files that it lacks.
      UserError: a folder whose weights can't be read, or are of another autoencoder.
    """
    if training.start is None:
        return None
    config, params = load_autoencoder(training.start)
    model = training.model
    wanted = model.image if isinstance(model, InflatedConfig) else model
    if difference := configs.difference(_kept(configs.to_json(config)), _kept(configs.to_json(wanted))):
        raise UserError(f"{training.start} holds another autoencoder than the config's: {difference}")
    if not isinstance(model, InflatedConfig):
        return params
    return inflate(wanted, params, key, span=model.span)[1]


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
    """What is trained of a denoiser and its text encoder: all of it, or adapters to what was given."""

    init: Callable[[Array], dict[str, Any]]
    """what is trained, from a random key"""
    params: dict[str, Any] | None
    """that were given"""
    lora: LoraConfig | None

    def loss(self, loss: Loss) -> Loss:
        """Of what is trained, from that of the model's parameters."""
        return loss if self.lora is None else LoraLoss(loss=loss, scale=self.lora.scale)

    def arguments(self) -> dict[str, Any]:
        """Of `Training`."""
        return {"start" if self.lora is None else "frozen": self.params}

    def adapter(self, trained: dict[str, Any]) -> dict[str, Any] | None:
        """The adapter that was trained; None where the whole was."""
        return None if self.lora is None else scaled(trained, self.lora.scale)

    def whole(self, trained: dict[str, Any]) -> dict[str, Any]:
        """The model's parameters, an adapter merged into those that it adapts."""
        adapter = self.adapter(trained)
        if adapter is None:
            return trained
        assert self.params is not None
        return merge_lora(self.params, adapter)


def trained_denoiser(training: DenoiserTraining, folder: Path, *, continues: bool) -> TrainedDenoiser:
    """What is trained, in `folder`, where there are checkpoints already or not.

    Raises:
      MissingError: no such folder as `training.start`.
      UserError: one that holds no pipeline, or one of another model; other weights than those that adapters were
        trained for before.
    """

    def init(key: Array) -> dict[str, Any]:
        return {
            "dit": init_params(training.dit.make, jax.random.fold_in(key, 0)),
            "text": init_params(training.text.make, jax.random.fold_in(key, 1)),
        }

    if training.start is None or (training.lora is None and continues):
        return TrainedDenoiser(init, None, None)
    params, lora = _given_denoiser(training), training.lora
    if lora is None:
        return TrainedDenoiser(init, params, None)
    _keep_identity(folder / "start.json", params, training.start)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return TrainedDenoiser(lambda key: init_lora(shapes, lora, key), params, lora)


def _given_denoiser(training: DenoiserTraining) -> dict[str, Any]:
    """The parameters of the pipeline that training starts from."""
    assert training.start is not None
    folder = Path(training.start)
    pipeline = load_pipeline(folder if (folder / PIPELINE).is_file() else folder / "pipeline")
    for part in ("dit", "text"):
        found, wanted = (_kept(configs.to_json(getattr(config, part))) for config in (pipeline.config, training))
        if difference := configs.difference(found, wanted):
            raise UserError(f"{folder} holds another denoiser than the config's, in {part}: {difference}")
    return pipeline.denoiser_params


def _keep_identity(path: Path, params: dict[str, Any], start: str) -> None:
    """Write down what is adapted; refuse to go on with something else."""
    digest = hashlib.sha256()
    for name, leaf in sorted(flatten(params).items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(leaf).data)
    identity = digest.hexdigest()[:16]
    if path.is_file() and (before := read_json(path).get("identity")) != identity:
        raise UserError(f"{start} has other weights ({identity}) than those adapted before ({before}); put them back")
    if jax.process_index() == 0 and not path.is_file():
        write_json(path, {"start": start, "identity": identity})


def _kept(config: Any) -> Any:
    """A config as JSON, without what only training knows."""
    if not isinstance(config, dict):
        return config
    return {name: _kept(value) for name, value in config.items() if name not in _OF_TRAINING}
