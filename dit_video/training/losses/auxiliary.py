"""Auxiliary losses: what a denoiser's training minimises besides its own loss, such as an alignment of features."""

import abc
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from dit_video.core.errors import UserError
from dit_video.core.trees import flatten
from dit_video.diffusion.processes import Estimate
from dit_video.models.backbones.block_features import check_blocks
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.nn import ONE_DEVICE, Partitioner, get_graph_def, init_params
from dit_video.tokens import PackedBatch
from dit_video.training.optim.schedules import Constant, Schedule

AUXILIARY = "auxiliary"
"""Name of the heads' parameters among the trained ones, `auxiliary/NAME/…`."""
_TAKEN_NAMES = ("denoising",)


class AuxiliaryInputs(NamedTuple):
    """A batch of a denoiser's training, and what the model makes of it."""

    rows: PackedBatch
    """Clean tokens, layout and fields; the captions as the model gets them, some replaced by the empty one."""
    time: Float[Array, "B N"]
    """Diffusion time of each token; 0 for known ones."""
    estimate: Estimate
    """Data and noise `B N p` that the model's prediction determines."""
    features: Mapping[int, Float[Array, "B N D"]]
    """Tokens behind each of the loss's `blocks`, by number of the block."""
    step: Int[Array, ""]
    """Number of steps done, with those of earlier stages."""


@dataclass(frozen=True, kw_only=True)
class AuxiliaryLoss(abc.ABC):
    """Configuration of a loss that is added to a denoiser's own, with a weight. One of another package is registered.

    `metrics.jsonl` has its mean over the clips, without the weight, as `loss_NAME`, and `loss_denoising` beside `loss`,
    the weighted sum.

    Raises:
      UserError: If the name is no word or taken, the weight is not positive, or a block is named twice.
    """

    name: str
    """Name of the loss among those of a training."""
    weight: float = 1.0
    """Peak of the weight."""
    schedule: Schedule = field(default_factory=lambda: Constant(warmup=0))
    """Course of the weight over the steps of a stage."""
    blocks: tuple[int, ...] = ()
    """Numbers of the blocks, from 0, behind which tokens are taken; none for a loss of the estimate."""

    def __post_init__(self):
        if not re.fullmatch(r"\w+", self.name) or self.name in _TAKEN_NAMES:
            raise UserError(f"name={self.name!r} is invalid: it must be a word that is not taken. Use another name.")
        if not self.weight > 0:
            raise UserError(f"weight={self.weight} is invalid: it must be positive. Use 0.5.")
        if len(set(self.blocks)) < len(self.blocks):
            raise UserError(f"blocks={list(self.blocks)} is invalid: a block is named twice. Name each once.")

    def make_head(self, backbone: BackboneConfig, *, partitioner: Partitioner, rngs: nnx.Rngs) -> nnx.Module:
        """Return the module that is trained with the model and left behind with the training; by default an empty one.

        Args:
          backbone: Config of the model, whose `width` (D) features have.
          partitioner: What its linear layers are made with.
          rngs: Random keys of its weights.
        """
        return nnx.Module()

    @abc.abstractmethod
    def compute(self, head: Any, inputs: AuxiliaryInputs) -> Float[Array, "B G"]:
        """Return the loss of each clip, such as `inputs.rows.layout.mean` of a value per token. Traceable.

        It must not depend on other clips of the row; values of segments that do not exist are not used.

        Args:
          head: What `make_head` returned, with the trained weights.
          inputs: The batch, and features of its tokens.
        """


class AuxiliaryTerm(NamedTuple):
    """An auxiliary loss in a stage of a training."""

    loss: AuxiliaryLoss
    head: nnx.GraphDef
    weight: optax.Schedule
    """Function from the number of steps done to the weight."""

    def sum_clips(self, params: Mapping[str, Any], inputs: AuxiliaryInputs) -> Float[Array, ""]:
        """Return the sum over the clips that count, in float32, from the trained parameters.

        Raises:
          UserError: If the loss has not one value per clip.
        """
        name, features = self.loss.name, {block: inputs.features[block] for block in self.loss.blocks}
        head = nnx.merge(self.head, params.get(AUXILIARY, {}).get(name, {}))
        values = self.loss.compute(head, inputs._replace(features=features))
        if values.shape != (shape := inputs.rows.valid.shape):
            rule = f"it has the shape {list(values.shape)}, not one value per clip, {list(shape)}"
            raise UserError(f"the auxiliary loss {name} is invalid: {rule}. Use layout.mean of values per token.")
        return jnp.where(inputs.rows.valid, values.astype(jnp.float32), 0).sum(axis=(0, 1))


def make_terms(
    losses: Sequence[AuxiliaryLoss],
    backbone: BackboneConfig,
    partitioner: Partitioner,
    *,
    steps: int,
    start_step: int = 0,
) -> tuple[AuxiliaryTerm, ...]:
    """Return the auxiliary losses of a stage of `steps` steps, which begins after `start_step` steps of earlier ones.

    Raises:
      UserError: If the stage is not longer than the warmup of a weight.
    """

    def make_weight(loss: AuxiliaryLoss) -> optax.Schedule:
        weight = loss.schedule.make(loss.weight, steps=steps)
        return lambda count: weight(count - start_step)

    def make_head(loss: AuxiliaryLoss) -> nnx.GraphDef:
        return get_graph_def(lambda rngs: loss.make_head(backbone, partitioner=partitioner, rngs=rngs))

    return tuple(AuxiliaryTerm(loss, make_head(loss), make_weight(loss)) for loss in losses)


def check_losses(losses: Sequence[AuxiliaryLoss], backbone: BackboneConfig, *, steps: int) -> None:
    """Check the auxiliary losses of a training of a model.

    Raises:
      UserError: If two have one name, the model cannot return what one reads, or the training is not longer than the
        warmup of a weight.
    """
    if len({loss.name for loss in losses}) < len(losses):
        names = ", ".join(loss.name for loss in losses)
        raise UserError(f"auxiliary ({names}) is invalid: two losses have one name. Give each its own.")
    for loss in losses:
        loss.schedule.make(loss.weight, steps=steps)
        if loss.blocks:
            check_blocks(backbone, loss.blocks)


def init_heads(losses: Sequence[AuxiliaryLoss], backbone: BackboneConfig, key: Array) -> dict[str, Any]:
    """Return random parameters of the heads, `{"auxiliary": {NAME: …}}`; empty if no head has any. Traceable."""

    def init_head(loss: AuxiliaryLoss) -> dict[str, Any]:
        own = jax.random.fold_in(key, zlib.crc32(f"{AUXILIARY}/{loss.name}".encode()))
        return init_params(lambda rngs: loss.make_head(backbone, partitioner=ONE_DEVICE, rngs=rngs), own)

    heads = {loss.name: params for loss in losses if (params := init_head(loss))}
    return {AUXILIARY: heads} if heads else {}


def get_head_shapes(losses: Sequence[AuxiliaryLoss], backbone: BackboneConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the heads' parameters by path."""
    return {
        path: leaf.shape
        for path, leaf in flatten(jax.eval_shape(lambda: init_heads(losses, backbone, jax.random.key(0)))).items()
    }


def split_heads(trained: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the trained parameters without the heads', and those alone; `a | b` joins them."""
    model = {name: params for name, params in trained.items() if name != AUXILIARY}
    return model, {name: params for name, params in trained.items() if name == AUXILIARY}
