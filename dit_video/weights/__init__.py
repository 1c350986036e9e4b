"""Weights as files: safetensors, never pickle."""

from dit_video.weights.safetensors import load, load_metadata, save

__all__ = ["load", "load_metadata", "save"]
