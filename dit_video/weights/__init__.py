"""Weights as files: safetensors, never pickle."""

from dit_video.weights.autoencoders import load_autoencoder, save_autoencoder
from dit_video.weights.folders import TensorFolder
from dit_video.weights.lpips import load_lpips, open_lpips
from dit_video.weights.safetensors import load, load_metadata, save
from dit_video.weights.text_encoders import (
    LoadedEncoder,
    load_embedder,
    load_text_encoder,
    save_text_encoder,
    text_encoder_config,
)

__all__ = [
    "LoadedEncoder",
    "TensorFolder",
    "load",
    "load_autoencoder",
    "load_embedder",
    "load_lpips",
    "load_metadata",
    "load_text_encoder",
    "open_lpips",
    "save",
    "save_autoencoder",
    "save_text_encoder",
    "text_encoder_config",
]
