"""The interface of backbones, the architectures of denoisers: what training, sampling and planning ask of them."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_video.conditioning import ClassIds, Conditioning, ConditioningLatents, ImageTokens, TextTokens
from dit_video.core.errors import UserError
from dit_video.nn import Attention, Backend, Remat
from dit_video.nn.attention import Full, Pattern, PatternChoice
from dit_video.tokens import Grid, PackedRows

ClipTokens = int | Grid
"""Size of a clip in tokens: their number, or their grid, which attention patterns other than `Full` need."""


@runtime_checkable
class Backbone(Protocol):
    """A denoiser's network."""

    config: "BackboneConfig"

    def __call__(
        self,
        noisy: Float[Array, "B N p"],
        time: Float[Array, "B _"],
        layout: PackedRows,
        conditioning: Conditioning,
        state: Any = None,
    ) -> tuple[Float[Array, "B N prediction"], Any]:
        """Predict from noisy tokens.

        The prediction is as wide as a token, or twice as wide with a learned variance: `[prediction, variance]` at each
        position in a patch.

        Args:
          noisy: noisy tokens.
          time: diffusion time (0 = data, 1 = noise), `B G`: one per segment; or, if the config's `time` is "token",
            `B N`: one per token.
          layout: places of the clips in the rows.
          conditioning: records of exactly the config's `conditioning_kinds`.
          state: state of the sampler's loop, which a model without caches returns as it is.

        Raises:
          UserError: a record is missing, or one that the model does not use is present.
        """
        ...


@runtime_checkable
class AttentionBackbone(Backbone, Protocol):
    """A backbone whose self-attention can be replaced: computed over devices, or recorded."""

    attention: Callable[[Pattern], Attention]
    """Factory of the self-attention functions, by pattern."""


class BackboneConfig(abc.ABC):
    """Configuration of a backbone, a frozen dataclass: it makes the backbone, and knows its inputs and its cost.

    The attributes below are fields of a subclass, or keep their value here. Configs of runs can hold a
    subclass of another package after `dit_video.core.registry.register`.
    """

    channels: int
    """Number of latent channels."""
    context_width: int
    """Width of the text encoder's output (E); 0 without text."""
    patch: Grid
    width: int
    layers: int
    heads: int
    dtype: str
    """Dtype of the matrix products."""
    remat: Remat
    """Activations that are kept for the backward pass."""
    attention: Backend
    time: Literal["segment", "token"] = "segment"
    """Diffusion time: one per clip, or one per token."""
    time_coordinate: Literal["tokens", "seconds"] = "tokens"
    """Unit of the time coordinate of positions."""
    cond_channels: int = 0
    """Number of channels of conditioning latents and masks."""
    image_width: int | None = None
    """Width of the image encoder's output (F); None for models without image tokens."""
    image_positions: int | None = None
    """Number of learned positions of image tokens, those of the first and the last frame together."""
    pattern: PatternChoice | tuple[PatternChoice, ...] = Full()
    """Pattern of self-attention, or several that the layers use in turn."""

    @abc.abstractmethod
    def make(self, rngs: nnx.Rngs) -> Any:
        """Return a backbone with random weights."""

    @abc.abstractmethod
    def count_multiplications(self, clip: ClipTokens, *, text: int, image: int) -> int:
        """Count the multiplications of a forward pass for one clip with these numbers of context tokens."""

    @abc.abstractmethod
    def count_pairs(self, clip: ClipTokens, *, text: int) -> int:
        """Count the query-key pairs of all layers, including those with the text."""

    @abc.abstractmethod
    def attention_pairs(self, grid: Grid) -> float:
        """Return the average number of token pairs per layer that attend to each other in a clip."""

    @abc.abstractmethod
    def widen_conditioning(self, leaves: dict[str, Array], channels: int) -> dict[str, Array]:
        """Return the parameters of the model with `channels` conditioning channels; weights of new ones are zero.

        Args:
          leaves: parameters of the model with this config, by path.
          channels: number of channels, larger than `cond_channels`.
        """

    @property
    @abc.abstractmethod
    def mlp_dim(self) -> int:
        """Return the hidden width of the MLP."""

    @property
    @abc.abstractmethod
    def layer_params(self) -> float:
        """Return the weights of attention and MLP in a layer that act on each video token, in units of width²."""

    def replace(self: "ConfigT", **changes: Any) -> "ConfigT":
        """Return the config with other values of some fields."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    @property
    def conditioning_kinds(self) -> frozenset[type]:
        """Return the kinds of conditioning that the model needs; it takes no other."""
        kinds = {
            TextTokens: self.context_width > 0,
            ClassIds: self.class_count > 0,
            ConditioningLatents: self.cond_channels > 0,
            ImageTokens: self.image_width is not None,
        }
        return frozenset(kind for kind, is_needed in kinds.items() if is_needed)

    @property
    def class_count(self) -> int:
        """Return the number of classes; 0 for a model without class labels."""
        return 0

    @property
    def max_text_tokens(self) -> int | None:
        """Return the number of tokens of the longest text that the model accepts; None without a limit."""
        return None

    @property
    def predicts_variance(self) -> bool:
        """Return True if the model predicts a variance, too (arXiv 2102.09672)."""
        return False

    @property
    def patterns(self) -> tuple[PatternChoice, ...]:
        """Return the patterns of self-attention that the layers use in turn."""
        return self.pattern if isinstance(self.pattern, tuple) else (self.pattern,)

    @property
    def needs_grids(self) -> bool:
        """Return True if the cost of attention depends on the grid of a clip, not only on its number of tokens."""
        return self.patterns != (Full(),)

    @property
    def token_width(self) -> int:
        """Return the number of values of one token (p)."""
        return self.patch.volume * self.channels

    @property
    def cond_width(self) -> int:
        """Return the number of values of the conditioning latents and masks of one token (g)."""
        return self.patch.volume * self.cond_channels


ConfigT = TypeVar("ConfigT", bound=BackboneConfig)


def count_self_pairs(config: BackboneConfig, clip: ClipTokens, global_tokens: int) -> float:
    """Count the self-attention pairs of an average layer; tokens without a position are assumed to see everything.

    Raises:
      UserError: the size of the clip is no grid, although the pattern needs one.
    """
    tokens = count_tokens(clip)
    if not config.needs_grids:
        return float((tokens + global_tokens) ** 2)
    if not isinstance(clip, Grid):
        raise UserError(f"pattern={config.pattern} needs a clip's grid, not its number of tokens, {clip}; give a Grid")
    return config.attention_pairs(clip) + global_tokens * (2 * tokens + global_tokens)


def count_tokens(clip: ClipTokens) -> int:
    """Return the number of tokens of a clip."""
    return clip.volume if isinstance(clip, Grid) else clip


def widen_kernel(kernel: Float[Array, "i D"], patch_volume: int, channels: int) -> Float[Array, "o D"]:
    """Add zero weights for new channels, which follow the old ones at each position in a patch."""
    by_position = jnp.reshape(kernel, (patch_volume, -1, kernel.shape[1]))
    return jnp.pad(by_position, ((0, 0), (0, channels - by_position.shape[1]), (0, 0))).reshape(-1, kernel.shape[1])
