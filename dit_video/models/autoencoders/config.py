"""Interface of autoencoders' configurations: models, sizes, and what each does in its own way while it is trained."""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array

from dit_video.core.errors import UserError
from dit_video.models.autoencoders.interface import Latents, Pixels, SegmentIds
from dit_video.models.autoencoders.latent_loss import KlLoss, LatentLoss
from dit_video.models.autoencoders.objective import AutoencoderObjective
from dit_video.models.autoencoders.patches import ClipStatistics
from dit_video.nn import ConvCache
from dit_video.tokens import Grid

LoadParams = Callable[["AutoencoderConfig"], dict[str, Any]]
"""Function that loads the parameters of an autoencoder with this config."""


class AutoencoderConfig(abc.ABC):
    """Configuration of an autoencoder, a frozen dataclass: it makes the module, and knows the size of its latents.

    `stride`, `channels` and `last_layer` are properties, or fields with a default. The other methods have defaults for
    a variational autoencoder (`Vae`) whose decoder is causal. Runs and pipelines can hold another package's subclass
    after `dit_video.core.registry.register`.
    """

    is_decoder_symmetric: ClassVar[bool] = False
    """True if decoded frames depend on later latents, too, so that a clip is decoded as a whole."""
    decode_time: float | None = None
    """Diffusion time at which latents are decoded, if the decoder is also a denoiser: its module is called as
    `decode(latents, cache, time=..., keys=...)`, with one key for each clip and chunk. None for any other decoder."""

    @property
    @abc.abstractmethod
    def stride(self) -> Grid:
        """Return the pixels per latent along (t, h, w); the first frame has a latent frame of its own."""

    @property
    @abc.abstractmethod
    def channels(self) -> int:
        """Return the channels of the latents."""

    @property
    def last_layer(self) -> str:
        """Return the path of the parameter that makes the pixels, the decoder's last kernel.

        Adversarial training weighs its losses by this parameter's gradients; nothing else needs it.

        Raises:
          UserError: If the config does not name one.
        """
        name = type(self).__name__
        raise UserError(
            f"adversarial is invalid: {name} does not name its decoder's last kernel. Give it a property last_layer"
        )

    @abc.abstractmethod
    def make(self, rngs: nnx.Rngs) -> nnx.Module:
        """Return an `Autoencoder` with random weights."""

    def make_loss(
        self, objective: AutoencoderObjective, is_trained: Callable[[str], bool] = lambda path: True
    ) -> LatentLoss:
        """Return the loss of the latents in training; by default their divergence from a standard normal.

        Args:
          objective: Weights of the terms, such as `kl`.
          is_trained: Returns whether the parameter at a path is trained.
        """
        return KlLoss(weight=objective.kl)

    def init_from_clips(self, clips: ClipStatistics) -> dict[str, Any]:
        """Return the initial parameters that follow from the training clips; by default none.

        It is called once, for a new training without other initial weights; the other parameters are random.
        """
        return {}

    def init_from_weights(self, load: LoadParams, key: Array) -> dict[str, Any]:
        """Return the initial parameters from trained ones; by default those of this autoencoder.

        Args:
          load: Loads the trained parameters.
          key: Random key for parameters that they lack.

        Raises:
          UserError: If the trained parameters are of another autoencoder.
        """
        return load(self)


@dataclass(frozen=True, kw_only=True)
class IdentityConfig(AutoencoderConfig):
    """Configuration of `IdentityAutoencoder`, which has no parameters."""

    stride: Grid = Grid(1, 1, 1)
    channels: int = 3

    def make(self, rngs: nnx.Rngs) -> "IdentityAutoencoder":
        return IdentityAutoencoder()


class IdentityAutoencoder(nnx.Module):
    """Pixels as latents."""

    def encode(self, pixels: Pixels, segment_ids: SegmentIds = None, cache: ConvCache | None = None) -> Latents:
        return pixels

    def decode(self, latents: Latents, cache: ConvCache | None = None) -> Pixels:
        return latents
