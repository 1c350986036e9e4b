"""LTX-Video's transformer."""

from dit_video.backbones.ltx.model import LtxDitConfig
