"""Floating-point operations of a denoiser's matrix products, counted from its config.

A multiplication and an addition are two operations (PaLM, arXiv 2204.02311, appendix B). Tokens attend to their own
clip, so attention is counted by the sum over clips of their token pairs. Padding is not counted, nor is recomputation
in the backward pass, nor norms, softmax, gates, rotary embedding, lookups and pooling (under 2 % for a width of 1,024).
"""

from collections.abc import Sequence

from dit_video.backbones.dit.conditioning import CrossAttention, JointAttention
from dit_video.backbones.dit.config import DitConfig
from dit_video.backbones.dit.positions import BoundaryEmbedding
from dit_video.backbones.wan.model import WanDitConfig
from dit_video.core.errors import UserError
from dit_video.nn.attention import Full
from dit_video.tokens import Grid

ClipTokens = int | Grid
"""Size of a clip in tokens: their number, or their grid, which attention patterns other than `Full` need."""

_TIME_FEATURES = 256
"""Input width of the linear layer of the time embedding of `Dit`."""


def count_forward_flops(
    config: DitConfig | WanDitConfig, clips: Sequence[ClipTokens], texts: Sequence[int], *, images: Sequence[int] = ()
) -> int:
    """Count the operations of one forward pass over clips, which do not depend on their packing.

    Args:
      config: config of the denoiser; text and image encoders are not included.
      clips: size of every clip (segment) in tokens.
      texts: number of context tokens of every clip; all 0 for a model without context. Wan's blocks attend to
        `text_length` tokens whatever the text, but project only those of the text.
      images: number of image tokens of every clip, for models that use them.

    Raises:
      UserError: different numbers of clips, texts and images, or a clip without a grid although the pattern needs one.
    """
    if len(clips) != len(texts) or len(images) not in (0, len(clips)):
        raise UserError(
            f"{len(clips)} clips need as many texts, not {len(texts)}, and images for all or none, not {len(images)}"
        )
    count = _count_wan if isinstance(config, WanDitConfig) else _count_dit
    sizes = zip(clips, texts, images or (0,) * len(clips), strict=True)
    return 2 * sum(count(config, *size) for size in sizes)  # type: ignore[arg-type, misc]


def count_training_flops(
    config: DitConfig | WanDitConfig,
    clips: Sequence[ClipTokens],
    texts: Sequence[int],
    *,
    images: Sequence[int] = (),
    adapters: bool = False,
) -> int:
    """Count the operations of a training step, from which the utilisation (MFU) is computed.

    Args:
      config, clips, texts, images: as for `count_forward_flops`, which also raises the errors.
      adapters: True if only LoRA adapters are trained.
    """
    return count_training_passes(adapters=adapters) * count_forward_flops(config, clips, texts, images=images)


def count_training_passes(*, adapters: bool = False) -> int:
    """Return the operations of a training step in units of a forward pass.

    The backward pass has two products for each one of the forward pass: the gradients of the input and of the weights,
    the latter not computed if only adapters are trained. The first layers count too, although their input needs no
    gradient.
    """
    return 2 if adapters else 3


def count_attention_flops(config: DitConfig | WanDitConfig, clips: Sequence[ClipTokens], texts: Sequence[int]) -> int:
    """Count the part of the forward pass that grows with the pairs of tokens: the work of the attention kernel."""
    pairs = sum(_count_pairs(config, clip, text) for clip, text in zip(clips, texts, strict=True))
    return 4 * config.width * pairs


def _count_pairs(config: DitConfig | WanDitConfig, clip: ClipTokens, text: int) -> int:
    """Count the query-key pairs of all layers, including those with the text."""
    if isinstance(config, WanDitConfig):
        return round(config.layers * (_count_self_pairs(config, clip, 0) + _count_tokens(clip) * config.text_length))
    global_tokens = config.registers + (text if isinstance(config.context, JointAttention) else 0)
    cross_pairs = (_count_tokens(clip) + global_tokens) * text if isinstance(config.context, CrossAttention) else 0
    return config.layers * cross_pairs + round(config.layers * _count_self_pairs(config, clip, global_tokens))


def _count_self_pairs(config: DitConfig | WanDitConfig, clip: ClipTokens, global_tokens: int) -> float:
    """Count the self-attention pairs of an average layer; tokens without a position are assumed to see everything."""
    tokens = _count_tokens(clip)
    if config.patterns == (Full(),):
        return float((tokens + global_tokens) ** 2)
    if not isinstance(clip, Grid):
        raise UserError(f"pattern={config.pattern} needs a clip's grid, not its number of tokens, {clip}; give a Grid")
    return config.attention_pairs(clip) + global_tokens * (2 * tokens + global_tokens)


def _count_tokens(clip: ClipTokens) -> int:
    return clip.volume if isinstance(clip, Grid) else clip


def _count_dit(config: DitConfig, clip: ClipTokens, text: int, image: int) -> int:
    """Count the multiplications for one clip."""
    if image:
        raise UserError(f"a DitConfig has no image tokens; leave out images, of which this clip has {image}")
    width, layers, square = config.width, config.layers, config.width**2
    video_tokens = _count_tokens(clip)
    tokens = video_tokens + config.registers
    block = 4 * square + (3 if config.mlp == "swiglu" else 2) * width * config.mlp_dim
    temporal = 0 if config.temporal is None else layers // config.temporal.spatial_layers * config.temporal.layers
    position = 0 if config.absolute_position is None else config.absolute_position.linear_features
    if temporal:
        position += BoundaryEmbedding().linear_features
    ends = video_tokens * width * (config.token_width + config.given_width + position + config.output_width)
    per_block = config.modulation == "own"
    modulations = 2 + 6 * ((layers + temporal) if per_block else 1)
    conditions = (tokens if config.time == "token" else 1) * (_TIME_FEATURES * width + square + modulations * square)
    if config.context.pooled:
        conditions += config.context_width * width
    context = 0
    if isinstance(config.context, CrossAttention | JointAttention):
        context += text * config.context_width * width
    if isinstance(config.context, CrossAttention):
        context += layers * 2 * square * (tokens + text)
    if isinstance(config.context, JointAttention):
        context += layers * text * block + (6 * layers * square if per_block else 0)
        if config.time == "token":
            conditions += _TIME_FEATURES * width + square + (0 if per_block else 6 * square)
    pairs = _count_pairs(config, clip, text)
    return tokens * (layers + temporal) * block + ends + conditions + context + 2 * width * pairs


def _count_wan(config: WanDitConfig, clip: ClipTokens, text: int, image: int) -> int:
    """Count the multiplications for one clip."""
    width, layers, square = config.width, config.layers, config.width**2
    tokens = _count_tokens(clip)
    if image and config.image_width is None:
        raise UserError(f"image_width=None has no image tokens; leave out images, of which this clip has {image}")
    block = 6 * square + 2 * width * config.mlp_dim
    ends = tokens * width * (2 * config.token_width + config.given_width)
    times = tokens if config.time == "token" else 1
    conditions = times * (config.time_width * width + 7 * square)
    context = text * (config.context_width * width + square + layers * 2 * square)
    if config.image_width is not None:
        context += image * (config.image_width**2 + config.image_width * width + layers * 2 * square)
    pairs = _count_pairs(config, clip, text) + layers * tokens * image
    return tokens * layers * block + ends + conditions + context + 2 * width * pairs
