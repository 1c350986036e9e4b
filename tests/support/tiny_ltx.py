"""A small random folder of LTX-Video in diffusers' layout, written by our own exporters."""

import json
from dataclasses import replace
from pathlib import Path

from dit_video.families import save_autoencoder, save_denoiser
from dit_video.models.autoencoders import LtxVaeConfig
from dit_video.models.backbones.ltx import LtxDitConfig
from support.random_params import make_random_params
from support.tiny_t5 import CONFIG as TEXT
from support.tiny_t5 import write_encoder, write_tokenizer

VAE = LtxVaeConfig(
    channels=4,
    widths=(4, 4, 4),
    blocks=(0, 0, 0, 1),
    downsampling=("conv", "conv", "conv"),
    decoder_widths=(4, 4, 4),
    decoder_blocks=(1, 0, 0, 0),
    upsampling=(True, True, True),
    upsample_factors=(1, 1, 1),
    upsample_residuals=(False, False, False),
    noise=(True, False, False, False),
    has_time=True,
)
RESIDUAL_VAE = replace(
    VAE, widths=(4, 4, 4, 8, 8), blocks=(0, 0, 0, 0, 1), downsampling=("spatial", "temporal", *["spatiotemporal"] * 2)
)
"""The autoencoder of versions from 0.9.5 on, in small."""
DIT = LtxDitConfig(channels=4, context_width=TEXT.width, width=16, layers=2, heads=2)
SIZE = (17, 32, 64)


def write_ltx(folder: Path, *, kind: str = "LTXPipeline", vae: LtxVaeConfig = VAE, **scheduler) -> None:
    """Write a pipeline of the class `kind`, with settings of its scheduler.

    As in published folders, the transformer's positions follow from the pipeline.
    """
    (folder / "scheduler").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    document = {"_class_name": "FlowMatchEulerDiscreteScheduler", **scheduler}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(document))
    save_denoiser(folder / "transformer", DIT, make_random_params(DIT.make))
    config = folder / "transformer" / "config.json"
    document = json.loads(config.read_text())
    del document["_causal_temporal_positioning"]
    config.write_text(json.dumps(document))
    save_autoencoder(folder / "vae", vae, make_random_params(vae.make))
    write_encoder(folder / "text_encoder", TEXT)
    write_tokenizer(folder / "tokenizer")
