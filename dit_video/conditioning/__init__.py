"""Conditioning: captions, frames and masks as inputs of a denoiser."""

from dit_video.conditioning.clip_conditioning import ClipConditioning, ClipView
from dit_video.conditioning.frame_conditioning import (
    COND_LATENTS,
    IMAGE_TOKENS,
    FrameConditioning,
    make_cond_latents,
    make_image_tokens,
    mask_first_frames,
)
from dit_video.conditioning.frames import GREY, fill_unknown_frames, fold_frame_mask
from dit_video.conditioning.prompts import drop_captions
from dit_video.conditioning.records import ClassIds, Conditioning, ConditioningLatents, ImageTokens, TextTokens
