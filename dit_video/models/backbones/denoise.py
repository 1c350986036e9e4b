"""The denoising function of a backbone, which diffusion calls."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool

from dit_video.diffusion import DenoiseFn, Prediction
from dit_video.models.backbones.protocol import Backbone, ClipTimes
from dit_video.models.conditioning import ClassIds, Conditioning, TextTokens
from dit_video.models.encoders import Context
from dit_video.tokens import PackedRows


def make_denoise_fn(
    backbone: Backbone,
    layout: PackedRows,
    conditioning: Conditioning,
    *,
    change_input: Callable[[Array, Array], tuple[Array, Array]] | None = None,
    is_clean: Bool[Array, "B N"] | None = None,
) -> DenoiseFn:
    """Return the `denoise` function of rows: noisy tokens `B N p` and times `B N`, or one time, to `B N prediction`.

    All tokens of a segment share one time, except in a model with a time per token. A predicted variance follows the
    whole prediction: the two are not interleaved per position as in the model's output.

    Args:
      backbone: The model.
      layout: Places of the clips in the rows.
      conditioning: Conditioning of the clips.
      change_input: Function that maps the tokens and their times `B N` to the ones that the model gets.
      is_clean: True for tokens at time 0, in a model with a time per token, if all other tokens of a clip share one
        time; None if the times of tokens are arbitrary.
    """
    config = backbone.config

    def denoise(noisy, time, state):
        time = jnp.broadcast_to(time, noisy.shape[:2])
        if change_input is not None:
            noisy, time = change_input(noisy, time)
        backbone_time: Array | ClipTimes = time
        if config.time == "segment":
            backbone_time = layout.max(time)
        elif is_clean is not None and config.accepts_clip_times:
            backbone_time = ClipTimes.from_tokens(time, is_clean, layout)
        prediction, next_state = backbone(noisy, backbone_time, layout, conditioning, state)
        if prediction.shape[-1] == noisy.shape[-1]:
            return prediction, next_state
        # The model's output holds prediction and variance for each position in a patch: (patch, 2, c) -> (2, patch, c).
        interleaved = prediction.reshape(*noisy.shape[:2], config.patch.volume, 2, -1)
        return jnp.swapaxes(interleaved, 2, 3).reshape(*noisy.shape[:2], -1), next_state

    return denoise


def adapt_prediction(prediction: Prediction, layout: PackedRows) -> Prediction:
    """Return the prediction for rows of several clips, with quantiles of each clip's own values."""

    def compute_quantile(values, quantile):
        return layout.expand(layout.quantile(values, quantile))[..., None]

    return prediction.with_quantile(compute_quantile)


def make_text_record(context: Context, layout: PackedRows) -> TextTokens | ClassIds:
    """Return the record of a text encoder's output: tokens, or classes."""
    if (classes := context.get_classes(layout.count)) is not None:
        return ClassIds(classes)
    assert context.values is not None
    assert context.segments is not None
    return TextTokens(context.values, context.segments)
