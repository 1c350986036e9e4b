"""Conditioning: captions, frames and masks as inputs of a denoiser."""

from dit_video.models.conditioning.clip_conditioning import (
    ClipConditioning,
    ClipView,
    Codec,
    FrameCrop,
    check_conditioning,
)
from dit_video.models.conditioning.control_clips import Control, ControlClip, LowResolutionClip
from dit_video.models.conditioning.frame_actions import FrameActions
from dit_video.models.conditioning.frame_conditioning import (
    COND_LATENTS,
    COND_MASK,
    GREY,
    IMAGE_TOKENS,
    FrameConditioning,
    blank_unknown,
    find_any_known,
    find_known_latents,
    find_partly_known_latents,
    fold_mask,
    interleave_mask,
    make_cond_latents,
    make_image_tokens,
    make_mask_fields,
    mask_first_frames,
    split_cells,
)
from dit_video.models.conditioning.masks import (
    Beginning,
    BothEnds,
    ClipMask,
    Ending,
    FirstAndLastFrame,
    FirstFrame,
    InsideOfBox,
    IsKnown,
    Keyframes,
    LastFrame,
    MaskGenerator,
    OutsideOfBox,
)
from dit_video.models.conditioning.records import (
    ClassIds,
    Conditioning,
    ConditioningLatents,
    ImageTokens,
    TextTokens,
    TrainingKeys,
    drop_captions,
)
