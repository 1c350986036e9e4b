"""Multimodal diffusion transformer (MMDiT of Stable Diffusion 3, arXiv 2403.03206) over packed rows.

It differs from `DiT` as follows: text and video tokens attend jointly, each kind with weights of its own, and the text
changes from block to block as the video does. Each block projects the modulation of both streams itself.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dit_video.core.errors import UserError, check_at_least
from dit_video.models.backbones.blocks import Stream, TokenConditions
from dit_video.models.backbones.dit import DiT
from dit_video.models.backbones.positions import BoundaryEmbedding, PositionEmbedding
from dit_video.models.backbones.protocol import ClipTimes, ClipTokens, count_self_pairs
from dit_video.models.backbones.transformer import TIME_FEATURES, TransformerConfig
from dit_video.models.conditioning import ClipConditioning, Conditioning
from dit_video.nn import ONE_DEVICE, Attention, AttentionInputs, Backend, Partitioner, Remat, modulate
from dit_video.nn.attention import Full, PatternChoice
from dit_video.tokens import Grid, PackedRows, Rotary3d, take_tokens


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig(TransformerConfig):
    """Configuration of the multimodal diffusion transformer; `DIT_SIZES` of `dit` are sizes of each stream.

    Raises:
      UserError: If there is no text, a size is below 1, the heads do not divide the width, the rotary split does not
        add up to the head width, patterns do not divide the layers, or the attention backend does not support them.
    """

    channels: int
    """Number of latent channels."""
    context_width: int
    """Width of the text encoder's output (E)."""
    pooled: bool = True
    """True if the text's mean modulates the blocks, in addition to the time."""
    patch: Grid = Grid(1, 2, 2)
    width: int = 384
    layers: int = 6
    heads: int = 6
    mlp_ratio: float = 4.0
    """Ratio of the MLP's hidden width (for SwiGLU, of each of the two) to the model's width."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    modulation: ClassVar[Literal["own"]] = "own"  # type: ignore[misc]
    time_coordinate: Literal["tokens", "seconds"] = "tokens"
    """Unit of the time coordinate; with seconds, `Rotary3d.scale` sets the number of steps per second."""
    rotary: Rotary3d | Literal["even", "none"] = "even"
    """Rotary embedding of video tokens; "even" is `Rotary3d.even` of the head width."""
    absolute_position: PositionEmbedding | None = BoundaryEmbedding()
    """Position embedding added to the video tokens."""
    pattern: PatternChoice | tuple[PatternChoice, ...] = Full()
    """Pattern of self-attention among video tokens, or several that the layers use in turn. Text belongs to no frame:
    all tokens of the clip see it, and it sees the whole clip, or with a causal pattern only itself."""
    time: Literal["segment", "token"] = "segment"
    """Diffusion time: one for all tokens of a clip, or one per token, which is 0 for tokens of known frames."""
    cond_channels: int = 0
    """Number of channels of clean latents and masks that accompany the noisy latents (`ConditioningLatents`)."""
    conditioning: tuple[ClipConditioning, ...] = ()
    """Conditioning on fields of the clips, as in `DiTConfig`."""
    attention: Backend = "auto"
    dtype: str = "float32"
    """Dtype of the matrix products; norms, modulation and the residual stream are float32."""
    remat: Remat = "none"

    def __post_init__(self):
        check_at_least(1, context_width=self.context_width)
        super().__post_init__()

    def check_cache(self) -> None:
        raise UserError(
            "a cache is invalid for MMDiT: its text depends on the clip, of which later frames are missing. Use DiT."
        )

    @property
    def has_cross_attention(self) -> bool:
        return False

    @property
    def embeds_text(self) -> bool:
        return True

    @property
    def pools_text(self) -> bool:
        return self.pooled

    @property
    def has_contiguous_clips(self) -> bool:
        return False

    def count_pairs(self, clip: ClipTokens, *, text: int) -> int:
        return round(self.layers * count_self_pairs(self, clip, self.extra_tokens + text))

    def count_multiplications(self, clip: ClipTokens, *, text: int, image: int) -> int:
        square = self.width**2
        stream = text * self.layers * self.block_multiplications + 6 * self.layers * square
        if self.time == "token":
            stream += TIME_FEATURES * self.width + square  # the text's time
        return super().count_multiplications(clip, text=text, image=image) + stream

    def make(self, rngs: nnx.Rngs, partitioner: Partitioner = ONE_DEVICE) -> "MMDiT":
        return MMDiT(self, partitioner=partitioner, rngs=rngs)


class MMDiTInputs(NamedTuple):
    """Inputs of all blocks besides the tokens and the attention function."""

    condition: TokenConditions
    """Conditions of the video tokens, from which the blocks and the head project their modulation."""
    context_condition: TokenConditions
    """Conditions of the text's tokens."""
    angles: Float[Array, "B N half"] | None
    """Rotary angles of queries and keys of video tokens; None for no rotation."""
    attention_inputs: AttentionInputs
    """Metadata for self-attention of the video tokens, followed by the text's."""

    @property
    def text_length(self) -> int:
        """Return the number of text tokens in a row."""
        assert self.context_condition.indices is not None
        return self.context_condition.indices.shape[1]

    def take(self, kept: Int[Array, "B K"]) -> "MMDiTInputs":
        """Return the inputs of some of the tokens; see `TransformerInputs`.

        Rows without all of the text's tokens at their end get NaN: the blocks would take others for them.

        Raises:
          UserError: If fewer tokens are kept than the text has.
        """
        if (start := kept.shape[1] - self.text_length) < 0:
            rule = f"all {self.text_length} tokens of the text are kept, at the end of each row"
            raise UserError(f"{kept.shape[1]} kept tokens are invalid: {rule}. Use the last numbers of a row, too.")
        video, total = kept[:, :start], self.attention_inputs.q_segments.shape[1]
        has_text = (kept[:, start:] == jnp.arange(total - self.text_length, total)).all(axis=1)
        text = self.context_condition
        return self._replace(
            condition=self.condition.take(video),
            context_condition=text._replace(values=jnp.where(has_text[:, None, None], text.values, jnp.nan)),
            angles=None if self.angles is None else take_tokens(self.angles, video),
            attention_inputs=self.attention_inputs.take(kept),
        )


class JointBlock(nnx.Module):
    """A block with two streams and joint attention; in `x` the text's tokens follow the video's."""

    def __init__(self, config: TransformerConfig, *, partitioner: Partitioner, rngs: nnx.Rngs):
        self.video = Stream(config, partitioner=partitioner, rngs=rngs)
        self.context = Stream(config, partitioner=partitioner, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], inputs: MMDiTInputs, attention: Attention) -> Float[Array, "B T D"]:
        length = x.shape[1] - inputs.text_length
        streams = (
            (self.video, x[:, :length], inputs.condition, inputs.angles),
            (self.context, x[:, length:], inputs.context_condition, None),
        )
        heads, gates = [], []
        for stream, start, condition, angles in streams:
            shift, scale, *rest = stream.compute_modulation(condition)
            heads.append(stream.project_qkv(modulate(start, shift, scale), angles))
            gates.append(rest)
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(*heads, strict=True))
        mixed = attention(q, k, v, inputs.attention_inputs)
        ends = []
        for (stream, start, *_), (gate, shift, scale, mlp_gate), mixed_part in zip(
            streams, gates, (mixed[:, :length], mixed[:, length:]), strict=True
        ):
            end = start + gate * stream.project_out(mixed_part)
            ends.append(end + mlp_gate * stream.apply_mlp(end, shift, scale))
        return jnp.concatenate(ends, axis=1)


class MMDiT(DiT):
    """The multimodal diffusion transformer on packed rows; see `BlockBackbone`."""

    block = JointBlock

    def embed_inputs(
        self,
        noisy: Float[Array, "B N p"],
        time: Float[Array, "B _"] | ClipTimes,
        layout: PackedRows,
        conditioning: Conditioning,
    ) -> tuple[Float[Array, "B T D"], MMDiTInputs]:
        """Return the embedded tokens, the clips' first and the text's last, and the blocks' other inputs."""
        video = self.append_extras(self.embed_tokens(noisy, layout, conditioning), layout, conditioning)
        condition, segment_condition = self.embed_conditions(video, time, layout, conditioning)
        text = self.embed_text(conditioning)
        segments = jnp.concatenate([video.segments, text.segments], axis=1)
        return jnp.concatenate([video.x, text.values.astype(jnp.float32)], axis=1), MMDiTInputs(
            condition=condition,
            context_condition=TokenConditions(segment_condition, text.segments),
            angles=self.config.compute_angles(video.positions),
            attention_inputs=self.make_attention_inputs(segments, layout),
        )
