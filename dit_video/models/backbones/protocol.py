"""Interface of backbones, the denoisers' architectures: what training, sampling and planning require of them."""

import abc
import dataclasses
import functools
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dit_video.core.errors import UserError, check_at_least
from dit_video.core.platform.devices import Platform
from dit_video.models.autoencoders import AutoencoderConfig
from dit_video.models.conditioning import (
    ClassIds,
    ClipConditioning,
    Conditioning,
    ConditioningLatents,
    FrameConditioning,
    ImageTokens,
    TextTokens,
)
from dit_video.nn import ONE_DEVICE, Backend, LayerWrapper, Partitioner, Remat
from dit_video.nn.attention import BackendName, Full, PatternChoice, choose_backend, count_pairs, get_backend_name
from dit_video.tokens import DenseBatch, Grid, PackedBatch, PackedRows, Rotary3d


class ClipTimes(NamedTuple):
    """Diffusion times of tokens: 0 for clean tokens, and the clip's time for all others."""

    values: Float[Array, "B G"]
    """Time of each clip's noisy tokens."""
    is_clean: Bool[Array, "B N"]

    @classmethod
    def from_tokens(cls, time: Float[Array, "B N"], is_clean: Bool[Array, "B N"], layout: PackedRows) -> "ClipTimes":
        """Return the times of tokens; all noisy tokens of a clip have the same time."""
        return cls(layout.max(jnp.where(is_clean, 0, time)), is_clean)

    @property
    def distinct(self) -> Float[Array, "B M"]:
        """Return the times that differ: each clip's, followed by 0 for each clip."""
        return jnp.concatenate([self.values, jnp.zeros_like(self.values)], axis=1)

    def get_numbers(self, layout: PackedRows) -> Int[Array, "B N"]:
        """Return the number of each token's time in `distinct`, from 1 on; 0 for padding."""
        segments = jnp.asarray(layout.segments)
        return jnp.where(self.is_clean & (segments > 0), segments + layout.count, segments)

    def expand(self, layout: PackedRows) -> Float[Array, "B N"]:
        """Return the time of every token."""
        return jnp.where(self.is_clean, 0, layout.expand(self.values))


ClipTokens = int | Grid
"""Size of a clip in tokens: their number, or their grid, which attention patterns other than `Full` need."""


TimeCoordinate = Literal["tokens", "seconds", "frame seconds"]
"""Time coordinate of a token's position: its number, its number times a token's duration in seconds, or the seconds
before its first frame, given that the first token has a single frame."""


@runtime_checkable
class Backbone(Protocol):
    """A denoiser's network."""

    config: "BackboneConfig"

    def __call__(
        self,
        noisy: Float[Array, "B N p"],
        time: Float[Array, "B _"] | ClipTimes,
        layout: PackedRows,
        conditioning: Conditioning,
        state: Any = None,
    ) -> tuple[Float[Array, "B N prediction"], Any]:
        """Predict from noisy tokens.

        The prediction is as wide as a token, or twice as wide with a learned variance: `[prediction, variance]` at each
        position in a patch.

        Args:
          noisy: Noisy tokens.
          time: Diffusion time (0 = data, 1 = noise), `B G`: one per segment; or, if the config's `time` is "token",
            `B N`: one per token, or `ClipTimes` if it `accepts_clip_times`.
          layout: Places of the clips in the rows.
          conditioning: Records of exactly the config's `conditioning_kinds`; in training also `TrainingKeys`, if the
            config says `draws_in_training`.
          state: State of the sampler's loop, as the config's `init_sampling_state` begins it, which a model without one
            returns unchanged; or None, as in training: no earlier step is known.

        Raises:
          UserError: If a record is missing, or there is one that the model does not use.
        """
        ...


@runtime_checkable
class TransformerInputs(Protocol):
    """Inputs of a backbone's blocks besides the tokens: positions, segments, times and conditioning."""

    def take(self, kept: Int[Array, "B K"]) -> "TransformerInputs":
        """Return the inputs of some of the tokens, such as those that are not routed around blocks.

        Args:
          kept: Numbers of the kept tokens in each row, in increasing order, with all tokens that follow the clips'.
        """
        ...


@runtime_checkable
class BlockBackbone(Backbone, Protocol):
    """A backbone made of an embedding, blocks and a head, which other backbones can call one by one.

    `x, inputs = embed_inputs(…)`, `x, outputs = apply_blocks(x, inputs)`, `apply_head(x[:, :N], inputs)` equals calling
    it, without the check of the conditioning. `apply_blocks(take_tokens(x, kept), inputs.take(kept))` applies blocks to
    some of the tokens.
    """

    blocks: nnx.Module
    """The blocks, a stack of `nn.make_stack`; each is called as `block(x, inputs, attention)`."""

    def embed_inputs(
        self,
        noisy: Float[Array, "B N p"],
        time: Float[Array, "B _"] | ClipTimes,
        layout: PackedRows,
        conditioning: Conditioning,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Return the embedded tokens, the clips' N first, and the other inputs of the blocks: `TransformerInputs`."""
        ...

    def apply_blocks(
        self,
        x: Float[Array, "B T D"],
        inputs: Any,
        *,
        layers: slice = slice(None),
        wrapper: LayerWrapper | None = None,
        values: Any = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Apply all blocks, or a range of them.

        Args:
          x, inputs: What `embed_inputs` returned.
          layers: Range of the blocks that are applied, without a step.
          wrapper: Function `(block, x, inputs, attention, values) -> (x, output)` that calls each block: it may add a
            residual, skip the block, route tokens around it, or wrap the attention function, whose keys need not be the
            queries' tokens, and return a value of the block.
          values: Values of each applied block for the wrapper, with a leading axis of layers.

        Returns:
          The tokens, and the outputs of the wrapper with a leading axis of layers; None without a wrapper.

        Raises:
          UserError: If `layers` has a step, or the model can't apply a range.
        """
        ...

    def apply_head(self, x: Float[Array, "B N D"], inputs: Any) -> Float[Array, "B N prediction"]:
        """Return the prediction for the clips' tokens, with inputs of all tokens."""
        ...


@runtime_checkable
class CachingBackbone(Backbone, Protocol):
    """A backbone that generates clips chunk by chunk; its state holds what later chunks need from finished ones."""

    def init_state(self, rows: int, tokens: int) -> Any:
        """Return the state before the first chunk, with room in each row for `tokens` tokens over all chunks.

        Raises:
          UserError: If a finished chunk would depend on later ones.
        """
        ...

    def extend(self, state: Any, clean: Float[Array, "B N p"], layout: PackedRows, conditioning: Conditioning) -> Any:
        """Return the state with a finished chunk of whole frames; if it does not fit, later predictions are NaN.

        Args:
          state: State of the earlier chunks, which calls of the backbone return unchanged.
          clean: Tokens of the chunk, as the backbone receives them at time 0.
          layout: Their places; positions count from the start of the clips.
          conditioning: Conditioning of the chunk.
        """
        ...


class BackboneConfig(abc.ABC):
    """Configuration of a backbone, a frozen dataclass: it makes the backbone, and knows its inputs and its cost.

    The attributes below are fields of a subclass, or keep their value here. By default, costs are counted for a plain
    transformer with cross-attention to the text; a subclass can count its own. A run's config can hold another
    package's subclass after `dit_video.core.registry.register`.
    """

    channels: int
    """Number of latent channels."""
    context_width: int = 0
    """Width of the text encoder's output (E); 0 without text."""
    patch: Grid = Grid(1, 2, 2)
    width: int
    layers: int
    heads: int = 1
    dtype: str = "float32"
    """Dtype of the matrix products."""
    remat: Remat = "none"
    """Activations that are kept for the backward pass."""
    attention: Backend = "auto"
    time: Literal["segment", "token"] = "segment"
    """Diffusion time: one per clip, or one per token."""
    classes: int = 0
    """Number of classes; 0 for a model without class labels."""
    draws_in_training: ClassVar[bool] = False
    """True if the model draws random numbers in training, from the keys of a `TrainingKeys`."""
    accepts_clip_times: ClassVar[bool] = False
    """True if a model with a time per token also takes `ClipTimes`, and spreads their projections over the tokens."""
    has_block_ranges: ClassVar[bool] = True
    """False if `apply_blocks` takes no range of the blocks."""
    time_coordinate: TimeCoordinate = "tokens"
    """Unit of the time coordinate of positions."""
    cond_channels: int = 0
    """Number of channels of conditioning latents and masks."""
    image_width: int | None = None
    """Width of the image encoder's output (F); None for models without image tokens."""
    image_positions: int | None = None
    """Number of learned positions of image tokens, for the first and the last frame together."""
    conditioning: tuple[ClipConditioning, ...] = ()
    """Conditioning on fields of the clips."""
    pattern: PatternChoice | tuple[PatternChoice, ...] = Full()
    """Pattern of self-attention, or several that the layers use in turn."""

    @abc.abstractmethod
    def make(self, rngs: nnx.Rngs, partitioner: Partitioner = ONE_DEVICE) -> Any:
        """Return a backbone with random weights, and with the attention and weights' sharding of `partitioner`."""

    def check_sizes(self) -> None:
        """Check the sizes of a transformer, before anything is computed from them.

        Raises:
          UserError: If channels, width, layers, heads or a side of the patch are below 1.
        """
        sizes = {name: getattr(self, name) for name in ("channels", "width", "layers", "heads")}
        check_at_least(1, **sizes, patch=min(self.patch))

    def init_sampling_state(self, rows: PackedBatch) -> Any:
        """Return the model's state before the first step of sampling; None if it has none.

        It is a tree of arrays with an axis of the rows first, in which each row depends on its own clips alone. The
        sampler carries it from step to step, apart for each branch of guidance and each expert:

        - All evaluations of a step get the state before it. The state after the first of them, which is at the step's
          start, is kept.
        - A branch that a step does not evaluate, such as the unconditional one outside of the interval of guidance,
          keeps its state. A branch that is evaluated alone goes on with its own.
        - Another expert, and latents that a task has changed, begin with this state again.

        Args:
          rows: Rows of clips; only their shapes matter where the sampler's program is compiled.
        """
        return None

    @property
    def has_sampling_state(self) -> bool:
        """Return True if the model may have a state in sampling."""
        return type(self).init_sampling_state is not BackboneConfig.init_sampling_state

    def count_multiplications(self, clip: ClipTokens, *, text: int, image: int) -> int:
        """Count the multiplications of a forward pass for one clip with these numbers of context tokens."""
        tokens, square = count_tokens(clip), self.width**2
        ends = tokens * self.width * (2 * self.token_width + self.cond_width)
        context = text * self.width * (self.context_width + self.layers * 2 * self.width)
        context += image * self.width * ((self.image_width or 0) + self.layers * 2 * self.width)
        pairs = self.count_pairs(clip, text=text) + self.layers * tokens * image
        return ends + context + round(tokens * self.layers * self.layer_params * square) + 2 * self.width * pairs

    def count_pairs(self, clip: ClipTokens, *, text: int) -> int:
        """Count the query-key pairs of all layers, including those with the text."""
        return round(self.layers * (count_self_pairs(self, clip, 0) + count_tokens(clip) * text))

    def attention_pairs(self, grid: Grid) -> float:
        """Return the average number of token pairs per layer that attend to each other in a clip."""
        return sum(count_pairs(pattern, grid) for pattern in self.patterns) / len(self.patterns)

    def resolve_attention(self, platform: Platform, *, tokens: int, segments: int) -> tuple[BackendName, ...]:
        """Return the backends of self-attention that the model uses, one for each of its patterns.

        Args:
          platform: Platform that the model is compiled for.
          tokens: Number of tokens of a row.
          segments: Largest number of clips in a row.
        """
        if self.attention != "auto":
            return (get_backend_name(self.attention),) * len(self.patterns)
        choose = functools.partial(
            choose_backend,
            platform,
            queries=tokens,
            keys=tokens,
            head_width=self.width // self.heads,
            dtype=self.dtype,
            segment_count=segments if self.has_contiguous_clips else None,
            biased=self.has_attention_bias,
        )
        return tuple(choose(pattern) for pattern in self.patterns)

    @property
    def has_contiguous_clips(self) -> bool:
        """Return True if the tokens of a clip follow one another in attention, with nothing in between."""
        return True

    @property
    def rotary_embedding(self) -> Rotary3d | None:
        """Return the rotary embedding of self-attention; None without one, or with another kind."""
        return None

    @property
    def has_attention_bias(self) -> bool:
        """Return True if attention adds a bias to its scores."""
        return False

    def widen_conditioning(self, leaves: dict[str, Array], channels: int) -> dict[str, Array]:
        """Return the parameters of the model with `channels` conditioning channels; weights of new ones are zero.

        Args:
          leaves: Parameters of the model with this config, by path.
          channels: Number of channels, larger than `cond_channels`.

        Raises:
          UserError: If the model reads no conditioning latents.
        """
        raise UserError(f"a model of {type(self).__name__} reads no conditioning latents; use another model")

    def compute_token_lead(self, stride: int) -> float:
        """Return the fraction of a token's time by which all but the first begin earlier."""
        frames = stride * self.patch.t
        return (frames - 1) / frames if self.time_coordinate == "frame seconds" else 0.0

    @property
    def mlp_dim(self) -> int:
        """Return the hidden width of the MLP."""
        return 4 * self.width

    @property
    def layer_params(self) -> float:
        """Return the number of a layer's attention and MLP weights that act on each video token, in units of width²."""
        return 4 + (2 if self.context_width else 0) + 2 * self.mlp_dim / self.width

    def replace(self: "ConfigT", **changes: Any) -> "ConfigT":
        """Return the config with other values of some fields."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    @property
    def conditioning_kinds(self) -> frozenset[type]:
        """Return the kinds of conditioning that the model needs; it takes no other."""
        kinds = {
            TextTokens: self.context_width > 0,
            ClassIds: self.classes > 0,
            ConditioningLatents: self.cond_channels > 0,
            ImageTokens: self.image_width is not None,
        }
        own = {each.record for each in self.conditioning}
        return frozenset(kind for kind, is_needed in kinds.items() if is_needed) | own

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
    def layouts(self) -> tuple[type[PackedRows], ...]:
        """Return the layouts of batches that the model accepts."""
        return (PackedRows, DenseBatch)

    @property
    def size_multiple(self) -> Grid:
        """Return the divisor of the latents' size along each axis."""
        return self.patch

    @property
    def canvas_padding(self) -> Grid:
        """Return how far apart clips lie on a canvas, in positions: as far as convolutions reach."""
        return self.size_multiple

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
      UserError: If the clip's size is not a grid, although the pattern needs one.
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


def check_frame_conditioning(
    backbone: BackboneConfig,
    autoencoder: AutoencoderConfig,
    frames: FrameConditioning | None,
    image_encoder: str | None,
    *,
    cached: bool,
) -> None:
    """Check that training provides the frame conditioning that the denoiser reads, and no other.

    Args:
      backbone: The denoiser.
      autoencoder: Autoencoder of its latents.
      frames: Conditioning on known frames.
      image_encoder: Folder of the image encoder; the denoiser attends to its tokens of the first frame.
      cached: True if latents are cached.

    Raises:
      UserError: If training lacks conditioning that the denoiser reads, or provides conditioning that it does not read.
    """
    attends, channels = backbone.image_width is not None, backbone.cond_channels
    if channels and frames is None:
        raise UserError("the denoiser reads conditioning latents, but frame_conditioning=None; set FrameConditioning()")
    if channels and channels <= backbone.channels:
        raise UserError(
            f"cond_channels={channels} is invalid: a mask needs channels. Use at least {backbone.channels + 1}"
        )
    if frames is not None and not channels and backbone.time != "token" and not attends:
        raise UserError(
            "frame_conditioning is invalid: the denoiser needs cond_channels or time='token'; set one, or leave it out"
        )
    if frames is not None and frames.rest == "grey":
        _check_grey(backbone, autoencoder, frames, cached=cached)
    if frames is not None and frames.has_mask_mix and attends:
        raise UserError("masks are invalid: image tokens are of a first frame. Use masks=(FirstFrame(),)")
    if attends:
        _check_image(backbone, frames, image_encoder, cached=cached)
    elif image_encoder is not None:
        raise UserError("image_encoder is invalid: the denoiser attends to no image tokens; leave out image_encoder")


def _check_grey(
    backbone: BackboneConfig, autoencoder: AutoencoderConfig, frames: FrameConditioning, *, cached: bool
) -> None:
    required = autoencoder.stride.t + autoencoder.channels
    has_clean_tokens = backbone.time == "token" and not backbone.cond_channels and frames.has_mask_mix
    if backbone.cond_channels != required and not has_clean_tokens:
        raise UserError(
            f"cond_channels={backbone.cond_channels} is invalid: with rest='grey' it must be {required}, a mask of "
            f"{autoencoder.stride.t} and the latents' {autoencoder.channels}; use rest='zero'"
        )
    if not cached and not frames.has_mask_mix:
        raise UserError("rest='grey' needs cached latents; set data cache_latents=True")


def _check_image(
    backbone: BackboneConfig, frames: FrameConditioning | None, image_encoder: str | None, *, cached: bool
) -> None:
    if frames is None:
        raise UserError(
            "the denoiser attends to a first frame, but frame_conditioning=None; set FrameConditioning(prob=1.0)"
        )
    if image_encoder is None:
        raise UserError("the denoiser attends to an image encoder's tokens; set image_encoder to its folder")
    if backbone.image_positions is not None:
        raise UserError("image_positions needs a last frame, which training does not provide; use a model without it")
    if not cached:
        raise UserError("an image encoder's tokens need cached latents; set data cache_latents=True")
