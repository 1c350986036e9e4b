"""Wan's transformer."""

from dit_video.models.backbones.wan.model import WanDitConfig
