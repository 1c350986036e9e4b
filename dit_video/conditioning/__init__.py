"""From prompts, frames and masks to what a model is given."""

from dit_video.conditioning.frames import blanked, folded
from dit_video.conditioning.known import KnownFrames, given_latents, known_tokens
from dit_video.conditioning.prompts import drop_captions

__all__ = ["KnownFrames", "blanked", "drop_captions", "folded", "given_latents", "known_tokens"]
