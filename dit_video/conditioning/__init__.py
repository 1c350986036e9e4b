"""From prompts and known frames to what a model is given."""

from dit_video.conditioning.known import KnownFrames, given_latents, known_tokens
from dit_video.conditioning.prompts import drop_captions

__all__ = ["KnownFrames", "drop_captions", "given_latents", "known_tokens"]
