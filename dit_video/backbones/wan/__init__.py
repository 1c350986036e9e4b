"""Wan's transformer."""

from dit_video.backbones.wan.model import WanDit, WanDitConfig

__all__ = ["WanDit", "WanDitConfig"]
