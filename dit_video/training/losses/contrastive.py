"""Contrastive losses of images and texts: CLIP's softmax (arXiv 2103.00020), SigLIP's sigmoid (2303.15343).

They couple the examples: each image is compared with all texts of the batch, which are gathered from other devices
first. So a batch cannot be accumulated from parts.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dit_video.distributed.mesh import AnyMesh
from dit_video.models.features.clip import l2_normalize
from dit_video.training.step import LossDetails, LossOutput

MAX_SCALE = 100.0
"""Maximum factor of the cosines, as in CLIP, without which training becomes unstable."""


class PairFeatures(NamedTuple):
    """Projected features of a batch's images and texts; a row of both belongs together."""

    images: Float[Array, "B P"]
    texts: Float[Array, "B P"]
    groups: Int[Array, " B"] | None = None
    """Number of each row's text, which all rows with this text have; None if all texts differ."""


class PairLoss(abc.ABC):
    """A loss of the cosines of all pairs in a batch."""

    @abc.abstractmethod
    def init(self) -> dict[str, Array]:
        """Return the initial parameters."""

    @abc.abstractmethod
    def __call__(
        self, params: dict[str, Array], cosines: Float[Array, "B B"], is_pair: Bool[Array, "B B"]
    ) -> Float[Array, ""]:
        """Return the mean loss of images (rows) and texts (columns) that belong together where `is_pair`."""


@dataclass(frozen=True, kw_only=True)
class SoftmaxLoss(PairLoss):
    """Cross-entropy of an image's text among all texts of the batch, and of a text's image, with a learned scale."""

    scale: float = 1 / 0.07
    """Initial factor of the cosines."""

    def init(self) -> dict[str, Array]:
        return {"log_scale": jnp.log(jnp.float32(self.scale))}

    def __call__(
        self, params: dict[str, Array], cosines: Float[Array, "B B"], is_pair: Bool[Array, "B B"]
    ) -> Float[Array, ""]:
        logits = cosines * _get_scale(params)
        targets = is_pair / is_pair.sum(axis=1, keepdims=True)  # of a text that several images have, a share each
        entropies = [-(targets * jax.nn.log_softmax(each, axis=1)).sum(axis=1) for each in (logits, logits.T)]
        return (entropies[0] + entropies[1]).mean(axis=0) / 2


@dataclass(frozen=True, kw_only=True)
class SigmoidLoss(PairLoss):
    """Binary cross-entropy of each pair, with a learned scale and bias: it needs no sums over the batch."""

    scale: float = 10.0
    """Initial factor of the cosines."""
    bias: float = -10.0
    """Initial bias, negative because most pairs do not belong together."""

    def init(self) -> dict[str, Array]:
        return {"log_scale": jnp.log(jnp.float32(self.scale)), "bias": jnp.float32(self.bias)}

    def __call__(
        self, params: dict[str, Array], cosines: Float[Array, "B B"], is_pair: Bool[Array, "B B"]
    ) -> Float[Array, ""]:
        logits = cosines * _get_scale(params) + params["bias"]
        return -jax.nn.log_sigmoid(jnp.where(is_pair, logits, -logits)).sum(axis=1).mean(axis=0)


@dataclass(frozen=True, kw_only=True)
class ContrastiveLoss:
    """Loss of a joint embedding of images and texts.

    The metric `accuracy` is the share of images whose text is nearest.

    Parameters are `{"towers": ..., "pairs": pair_loss.init()}`.
    """

    embed: Callable[[Any, Any], PairFeatures]
    """Function `embed(params["towers"], batch)`."""
    pair_loss: PairLoss = SoftmaxLoss()
    mesh: AnyMesh | None = None
    """Mesh over whose axis `data` the rows of a batch are sharded; None for a single device."""

    def __call__(self, params: Any, batch: Any, step: Array) -> LossOutput:
        features = self._gather(self.embed(params["towers"], batch))
        cosines = l2_normalize(features.images) @ l2_normalize(features.texts).T
        groups = jnp.arange(len(cosines)) if features.groups is None else features.groups
        is_pair = groups[:, None] == groups
        nearest = jnp.take_along_axis(is_pair, cosines.argmax(axis=1, keepdims=True), axis=1)
        metrics = {"accuracy": nearest.mean(), "scale": _get_scale(params["pairs"])}
        return LossOutput(self.pair_loss(params["pairs"], cosines, is_pair), LossDetails(metrics))

    def _gather(self, features: PairFeatures) -> PairFeatures:
        """Return the features of all devices on each of them; their similarities are cheap."""
        if self.mesh is None:
            return features
        return jax.lax.with_sharding_constraint(features, NamedSharding(self.mesh, PartitionSpec()))


def _get_scale(params: dict[str, Array]) -> Float[Array, ""]:
    return jnp.exp(jnp.minimum(params["log_scale"], jnp.log(MAX_SCALE)))
