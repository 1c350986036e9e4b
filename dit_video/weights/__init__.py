"""Readers and writers of model weights: safetensors files and the folders of other projects.

Pickles are never run; `torch_files` reads the tensors of PyTorch's files without that.
"""

from dit_video.weights.clip import (
    load_clip,
    load_clip_text,
    load_clip_vision,
    read_clip_text_config,
    read_clip_vision_config,
    save_clip,
)
from dit_video.weights.clip_image_processor import load_clip_image_processor, save_clip_image_processor
from dit_video.weights.embedders import load_embedder, read_text_encoder_config
from dit_video.weights.folders import TensorFolder
from dit_video.weights.lora import load_lora, save_lora
from dit_video.weights.lora_modules import LoraModule, expand_layers, get_native_modules
from dit_video.weights.lpips import load_lpips
from dit_video.weights.safetensors import load, load_metadata, save
from dit_video.weights.scheduler import LoadedScheduler, load_scheduler
from dit_video.weights.text_encoders import load_text_encoder, read_t5_config, save_text_encoder
