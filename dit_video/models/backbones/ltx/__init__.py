"""LTX-Video's transformer."""

from dit_video.models.backbones.ltx.model import LtxDitConfig
