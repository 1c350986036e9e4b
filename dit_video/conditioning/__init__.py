"""From prompts (later: frames and masks) to what a model is given."""

from dit_video.conditioning.prompts import drop_captions

__all__ = ["drop_captions"]
