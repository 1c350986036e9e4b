"""Conditioning: captions, frames and masks as inputs of a denoiser."""

from dit_video.conditioning.frames import fill_unknown_frames, fold_frame_mask
from dit_video.conditioning.known import KnownFrames, make_cond_latents, mask_known_tokens
from dit_video.conditioning.prompts import drop_captions
from dit_video.conditioning.records import ClassIds, Conditioning, ConditioningLatents, ImageTokens, TextTokens

__all__ = [
    "ClassIds",
    "Conditioning",
    "ConditioningLatents",
    "ImageTokens",
    "KnownFrames",
    "TextTokens",
    "drop_captions",
    "fill_unknown_frames",
    "fold_frame_mask",
    "make_cond_latents",
    "mask_known_tokens",
]
