"""Readers and writers of model weights: safetensors files and the folders of other projects.

Pickles are never run; `torch_files` reads the tensors in PyTorch's files without running them.
"""

from dit_video.weights.clip import (
    load_clip,
    load_clip_image_processor,
    load_clip_text,
    load_clip_vision,
    read_clip_text_config,
    read_clip_vision_config,
    save_clip,
    save_clip_image_processor,
)
from dit_video.weights.feature_networks import load_lpips
from dit_video.weights.folders import TensorFolder
from dit_video.weights.lora import LoraModule, expand_layers, get_native_modules, load_lora, save_lora
from dit_video.weights.safetensors import load, load_metadata, save
from dit_video.weights.scheduler import LoadedScheduler, load_scheduler
from dit_video.weights.text_encoders import (
    load_embedder,
    load_text_encoder,
    read_t5_config,
    read_text_encoder_config,
    save_text_encoder,
)
