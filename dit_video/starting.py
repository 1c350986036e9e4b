"""What the training of an autoencoder starts with: its loss, and the weights that it was given."""

from typing import Any

from jaxtyping import Array

from dit_video import configs, rng
from dit_video.autoencoder import InflatedConfig, VqConfig, inflate
from dit_video.errors import UserError
from dit_video.experiment import AutoencoderTraining
from dit_video.features import Lpips
from dit_video.nn import graph_of
from dit_video.training.adversarial import Rival
from dit_video.training.autoencoder import AutoencoderLoss
from dit_video.training.vq import VqLoss
from dit_video.weights import load_autoencoder, load_lpips

_OF_TRAINING = ("bfloat16", "std")
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


def _kept(config: Any) -> Any:
    """A config as JSON, without what only training knows."""
    if not isinstance(config, dict):
        return config
    return {name: _kept(value) for name, value in config.items() if name not in _OF_TRAINING}
