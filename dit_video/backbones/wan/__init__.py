"""Wan's transformer."""

from dit_video.backbones.wan.model import WanDitConfig
