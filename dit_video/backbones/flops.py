"""How much a denoiser computes: the floating-point operations of its matrix products, counted from its config.

A multiplication and an addition are two operations (PaLM, arXiv 2204.02311, appendix B). A clip's tokens attend to each
other, so attention counts by the sum of the clips' own pairs; padding counts for nothing, and what is computed again in
a backward pass neither. Not counted: norms, softmax, gates, rotary positions, lookups, pooling (under 2 % of a
model 1,024 wide).
"""

from collections.abc import Sequence

from dit_video.backbones.dit.conditioning import CrossAttention, JointAttention
from dit_video.backbones.dit.config import DitConfig
from dit_video.backbones.dit.positions import EndDistances
from dit_video.backbones.wan.model import WanDitConfig
from dit_video.core.errors import UserError
from dit_video.nn.attention import Full
from dit_video.tokens import Grid

Clip = int | Grid
"""A clip in tokens: their number, or, where a pattern of attention asks where they lie, their grid"""

_DISTANCES, _SINES = 6 * 32, 256
"""Values that `EndDistances` and the time embedding of `Dit` give their linear maps"""


def forward_flops(
    config: DitConfig | WanDitConfig, clips: Sequence[Clip], texts: Sequence[int], *, images: Sequence[int] = ()
) -> int:
    """Operations of one forward pass over clips, however they are packed.

    Args:
      config: of the denoiser; what encodes texts is not part of it.
      clips: tokens of every clip (segment).
      texts: context tokens of every clip; all 0 for a model without context. Wan's blocks attend to `text_length`
        tokens whatever the text, but project those of the text alone.
      images: tokens of the image encoder for every clip, for the models that take them.

    Raises:
      UserError: numbers of clips, texts and images that differ; a clip without a grid where the pattern needs one.
    """
    if len(clips) != len(texts) or len(images) not in (0, len(clips)):
        raise UserError(f"{len(clips)} clips need as many texts, not {len(texts)}, and images for all or none")
    count = _wan if isinstance(config, WanDitConfig) else _dit
    each = zip(clips, texts, images or (0,) * len(clips), strict=True)
    return 2 * sum(count(config, *clip) for clip in each)  # type: ignore[arg-type, misc]


def training_flops(
    config: DitConfig | WanDitConfig,
    clips: Sequence[Clip],
    texts: Sequence[int],
    *,
    images: Sequence[int] = (),
    adapters: bool = False,
) -> int:
    """Operations of a training step, which is what utilisation (MFU) is counted by. Errors are as for `forward_flops`.

    Args:
      config, clips, texts, images: as for `forward_flops`.
      adapters: whether those alone are trained.
    """
    return training_passes(adapters=adapters) * forward_flops(config, clips, texts, images=images)


def training_passes(*, adapters: bool = False) -> int:
    """How many forward passes' worth of operations a training step has.

    A backward pass has two products for each of the forward pass: for what goes in, and for the weights, which is left
    out where adapters alone are trained. That of the very first maps, whose input needs no gradient, is counted with
    them.
    """
    return 2 if adapters else 3


def attention_flops(config: DitConfig | WanDitConfig, clips: Sequence[Clip], texts: Sequence[int]) -> int:
    """The part of `forward_flops` that grows with the pairs of tokens: what an attention kernel computes."""
    number = sum(_attended(config, clip, text) for clip, text in zip(clips, texts, strict=True))
    return 4 * config.width * number


def _attended(config: DitConfig | WanDitConfig, clip: Clip, text: int) -> int:
    """Pairs of all layers, those with the text included."""
    if isinstance(config, WanDitConfig):
        return round(config.layers * (_pairs(config, clip, 0) + _number(clip) * config.text_length))
    behind = config.registers + (text if isinstance(config.context, JointAttention) else 0)
    crossed = (_number(clip) + behind) * text if isinstance(config.context, CrossAttention) else 0
    return config.layers * crossed + round(config.layers * _pairs(config, clip, behind))


def _pairs(config: DitConfig | WanDitConfig, clip: Clip, behind: int) -> float:
    """Of self-attention, in a layer on average; of the tokens that lie nowhere all see all."""
    tokens = _number(clip)
    if config.patterns == (Full(),):
        return float((tokens + behind) ** 2)
    if not isinstance(clip, Grid):
        raise UserError(
            f"attention with the pattern {config.pattern} is counted on a clip's grid, not on {clip} tokens"
        )
    return config.pairs(clip) + behind * (2 * tokens + behind)


def _number(clip: Clip) -> int:
    return clip.volume if isinstance(clip, Grid) else clip


def _dit(config: DitConfig, clip: Clip, text: int, image: int) -> int:
    """Multiplications of one clip."""
    if image:
        raise UserError("a DitConfig takes no image tokens")
    width, layers, square = config.width, config.layers, config.width**2
    seen = _number(clip)
    tokens = seen + config.registers
    block = 4 * square + (3 if config.mlp == "swiglu" else 2) * width * config.hidden_width
    temporal = 0 if config.temporal is None else layers // config.temporal.every * config.temporal.layers
    distances = _DISTANCES * (isinstance(config.added_position, EndDistances) + (temporal > 0))
    ends = seen * width * (config.token_width + config.given_width + distances + config.head_width)
    own = config.modulation == "own"
    modulations = 2 + 6 * ((layers + temporal) if own else 1)
    conditions = (tokens if config.time == "token" else 1) * (_SINES * width + square + modulations * square)
    if config.context.pooled:
        conditions += config.context_width * width
    context = 0
    if isinstance(config.context, CrossAttention | JointAttention):
        context += text * config.context_width * width
    if isinstance(config.context, CrossAttention):
        context += layers * 2 * square * (tokens + text)
    if isinstance(config.context, JointAttention):
        context += layers * text * block + (6 * layers * square if own else 0)
        if config.time == "token":
            conditions += _SINES * width + square + (0 if own else 6 * square)
    return (
        tokens * (layers + temporal) * block + ends + conditions + context + 2 * width * _attended(config, clip, text)
    )


def _wan(config: WanDitConfig, clip: Clip, text: int, image: int) -> int:
    """Multiplications of one clip."""
    width, layers, square = config.width, config.layers, config.width**2
    tokens = _number(clip)
    if image and config.image_width is None:
        raise UserError("this model takes no image tokens: its config has no image_width")
    block = 6 * square + 2 * width * config.hidden_width
    ends = tokens * width * (2 * config.token_width + config.given_width)
    at = tokens if config.time == "token" else 1
    conditions = at * (config.time_width * width + 7 * square)
    context = text * (config.context_width * width + square + layers * 2 * square)
    if config.image_width is not None:
        context += image * (config.image_width**2 + config.image_width * width + layers * 2 * square)
    pairs = _attended(config, clip, text) + layers * tokens * image
    return tokens * layers * block + ends + conditions + context + 2 * width * pairs
