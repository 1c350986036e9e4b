"""Wan's transformer."""

from dit_video.backbones.wan.model import WanDitConfig

__all__ = ["WanDit", "WanDitConfig"]
