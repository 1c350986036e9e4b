"""Floating-point operations of a denoiser's matrix products, counted from its config.

A multiplication and an addition are two operations (PaLM, arXiv 2204.02311, appendix B). Tokens attend only to their
own clip, so attention is counted by token pairs, summed over clips. Padding is not counted, nor is recomputation in the
backward pass, nor norms, softmax, gates, rotary embedding, lookups and pooling (under 2 % for a width of 1,024).
"""

from collections.abc import Sequence

from dit_video.core.errors import UserError
from dit_video.models.backbones.protocol import BackboneConfig, ClipTokens


def count_forward_flops(
    config: BackboneConfig, clips: Sequence[ClipTokens], texts: Sequence[int], *, images: Sequence[int] = ()
) -> int:
    """Count the operations of one forward pass over clips, which do not depend on their packing.

    Args:
      config: Config of the denoiser; text and image encoders are not included.
      clips: Size of every clip (segment) in tokens.
      texts: Number of context tokens of every clip; all 0 for a model without context. Wan's blocks attend to
        `text_length` tokens whatever the text, but project only the text's own tokens.
      images: Number of image tokens of every clip, for models that use them.

    Raises:
      UserError: If the numbers of clips, texts and images differ, or a clip has no grid although the pattern needs one.
    """
    if len(clips) != len(texts) or len(images) not in (0, len(clips)):
        raise UserError(
            f"{len(clips)} clips need as many texts, not {len(texts)}, and images for all or none, not {len(images)}"
        )
    sizes = zip(clips, texts, images or (0,) * len(clips), strict=True)
    return 2 * sum(config.count_multiplications(clip, text=text, image=image) for clip, text, image in sizes)


def count_training_flops(
    config: BackboneConfig,
    clips: Sequence[ClipTokens],
    texts: Sequence[int],
    *,
    images: Sequence[int] = (),
    adapters: bool = False,
) -> int:
    """Count the operations of a training step, from which the utilisation (MFU) is computed.

    Args:
      config, clips, texts, images: As for `count_forward_flops`, which also raises the errors.
      adapters: True if only LoRA adapters are trained.
    """
    return count_training_passes(adapters=adapters) * count_forward_flops(config, clips, texts, images=images)


def count_training_passes(*, adapters: bool = False) -> int:
    """Return the operations of a training step in units of a forward pass.

    The backward pass has two products for each one of the forward pass: the gradient of the input, and the gradient of
    the weights, which is not computed if only adapters are trained. The first layers count too, although their input
    needs no gradient.
    """
    return 2 if adapters else 3


def count_attention_flops(config: BackboneConfig, clips: Sequence[ClipTokens], texts: Sequence[int]) -> int:
    """Count the part of the forward pass that grows with the pairs of tokens: the work of the attention kernel."""
    pairs = sum(config.count_pairs(clip, text=text) for clip, text in zip(clips, texts, strict=True))
    return 4 * config.width * pairs
