"""Readers and writers of model weights: safetensors files and the folders of other projects, never pickles."""

from dit_video.weights.clip import (
    LoadedClip,
    clip_text_config,
    clip_vision_config,
    load_clip,
    load_clip_text,
    load_clip_vision,
    save_clip,
)
from dit_video.weights.clip_images import load_clip_images, save_clip_images
from dit_video.weights.embedders import load_embedder, text_encoder_config
from dit_video.weights.folders import TensorFolder
from dit_video.weights.lora import Module, Modules, load_lora, numbered, own_modules, save_lora
from dit_video.weights.lpips import load_lpips, open_lpips
from dit_video.weights.safetensors import load, load_metadata, save
from dit_video.weights.scheduler import Schedule, load_scheduler
from dit_video.weights.text_encoders import LoadedEncoder, load_text_encoder, save_text_encoder, t5_config

__all__ = [
    "LoadedClip",
    "LoadedEncoder",
    "Module",
    "Modules",
    "Schedule",
    "TensorFolder",
    "clip_text_config",
    "clip_vision_config",
    "load",
    "load_clip",
    "load_clip_images",
    "load_clip_text",
    "load_clip_vision",
    "load_embedder",
    "load_lora",
    "load_lpips",
    "load_metadata",
    "load_scheduler",
    "load_text_encoder",
    "numbered",
    "open_lpips",
    "own_modules",
    "save",
    "save_clip",
    "save_clip_images",
    "save_lora",
    "save_text_encoder",
    "t5_config",
    "text_encoder_config",
]
