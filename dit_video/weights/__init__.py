"""Weights as files: safetensors, never pickle."""

from dit_video.weights.autoencoders import load_autoencoder, save_autoencoder
from dit_video.weights.safetensors import load, load_metadata, save

__all__ = ["load", "load_autoencoder", "load_metadata", "save", "save_autoencoder"]
