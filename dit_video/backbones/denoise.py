"""The denoising function of a backbone, which diffusion calls."""

import jax.numpy as jnp

from dit_video.backbones.protocol import Backbone
from dit_video.conditioning import ClassIds, Conditioning, TextTokens
from dit_video.diffusion import DenoiseFn
from dit_video.text import Context
from dit_video.tokens import PackedRows


def make_denoise_fn(backbone: Backbone, layout: PackedRows, conditioning: Conditioning) -> DenoiseFn:
    """Return the `denoise` of rows, from noisy tokens `B N p` and times `B N` to `B N prediction`.

    All tokens of a segment have one time, except in a model with a time per token. A predicted variance follows the
    whole prediction: the two are not interleaved per position as in the model's output.
    """
    config = backbone.config

    def denoise(noisy, time, state):
        backbone_time = time if config.time == "token" else layout.max(time)
        prediction, next_state = backbone(noisy, backbone_time, layout, conditioning, state)
        if prediction.shape[-1] == noisy.shape[-1]:
            return prediction, next_state
        # The model's output holds prediction and variance for each position in a patch: (patch, 2, c) -> (2, patch, c).
        interleaved = prediction.reshape(*noisy.shape[:2], config.patch.volume, 2, -1)
        return jnp.swapaxes(interleaved, 2, 3).reshape(*noisy.shape[:2], -1), next_state

    return denoise


def make_text_record(context: Context, layout: PackedRows) -> TextTokens | ClassIds:
    """Return the record of what a text encoder made: tokens, or classes."""
    if (classes := context.get_classes(layout.count)) is not None:
        return ClassIds(classes)
    assert context.values is not None
    assert context.segments is not None
    return TextTokens(context.values, context.segments)
