"""A small random folder of Wan in diffusers' layout, written by our own exporters."""

import json
from dataclasses import replace
from pathlib import Path

from dit_video.families import save_autoencoder, save_denoiser
from dit_video.models.autoencoders import CausalVaeConfig
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.models.features import ClipImageProcessor
from dit_video.tokens import Grid
from dit_video.weights import save_clip_image_processor
from support.random_params import make_random_params
from support.tiny_clip import VISION, write_clip
from support.tiny_t5 import CONFIG as TEXT
from support.tiny_t5 import write_encoder, write_tokenizer

VAE = CausalVaeConfig(
    channels=4, width=8, multipliers=(1, 1, 1), factors=(Grid(2, 2, 2), Grid(2, 2, 2)), blocks=1
)  # strides of 4
DIT = WanDitConfig(channels=4, context_width=TEXT.width, width=16, mlp_dim=24, layers=2, heads=2, time_width=8)
UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}
TWO = {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875}
ANIMATING = replace(DIT, cond_channels=4 + 4, image_width=VISION.width)
"""The config of an I2V 2.1."""
SIZE = (5, 16, 16)


def write_wan(folder: Path, *, backbone: WanDitConfig = DIT, **index) -> None:
    """Write a pipeline, with `index` added to its `model_index.json`, such as `**TWO` for two experts."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "_class_name": "WanPipeline",
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "boundary_ratio": None,
        "expand_timesteps": backbone.time == "token",
        **index,
    }
    (folder / "model_index.json").write_text(json.dumps(document))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(UNIPC))
    save_denoiser(folder / "transformer", backbone, make_random_params(backbone.make))
    if "transformer_2" in index:
        save_denoiser(folder / "transformer_2", backbone, make_random_params(backbone.make, seed=1))
    save_autoencoder(folder / "vae", VAE, make_random_params(VAE.make))
    write_encoder(folder / "text_encoder", replace(TEXT, position_bias="each layer"))
    write_tokenizer(folder / "tokenizer")


def write_animating_wan(folder: Path, *, backbone: WanDitConfig = ANIMATING) -> None:
    """Write a Wan 2.1 pipeline that animates an image, given as latents with a mask and as tokens of a CLIP."""
    parts = {"image_encoder": ["transformers", "CLIPVisionModel"], "image_processor": ["transformers", "x"]}
    write_wan(folder, backbone=backbone, _class_name="WanImageToVideoPipeline", **parts)
    write_clip(folder / "image_encoder", VISION)
    (folder / "image_processor").mkdir()
    save_clip_image_processor(
        folder / "image_processor", ClipImageProcessor(resize=VISION.size, crop=(VISION.size, VISION.size))
    )
