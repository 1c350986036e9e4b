"""Conditioning: captions, frames and masks as inputs of a denoiser."""

from dit_video.conditioning.frames import blanked, folded
from dit_video.conditioning.known import KnownFrames, given_latents, known_tokens
from dit_video.conditioning.prompts import drop_captions

__all__ = ["KnownFrames", "blanked", "drop_captions", "folded", "given_latents", "known_tokens"]
