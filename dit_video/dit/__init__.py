"""Denoisers."""

from dit_video.dit.model import Dit, DitConfig, packed_denoise

__all__ = ["Dit", "DitConfig", "packed_denoise"]
