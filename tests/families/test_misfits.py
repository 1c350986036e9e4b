"""Errors of all loaders for files that do not fit, which name the first ten tensors of each kind."""

import dataclasses

import numpy as np
import pytest
import safetensors.numpy

from dit_video.core.errors import UserError
from dit_video.families import load_autoencoder, load_denoiser, save_autoencoder, save_denoiser
from dit_video.models.autoencoders import CausalVaeConfig, CodebookConfig, ImageLevels, ImageVaeConfig, VqConfig
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.tokens import Grid
from dit_video.weights import load_clip, load_text_encoder, save_clip, save_text_encoder
from dit_video.weights.io import write_native
from dit_video.weights.streaming import ParamsSource
from support.random_params import make_random_params
from support.tiny_class_dit import DIT
from support.tiny_clip import CONFIG as CLIP
from support.tiny_t5 import CONFIG as T5

WAN = WanDitConfig(channels=4, context_width=6, width=16, mlp_dim=24, layers=2, heads=2, time_width=8)
WAN_VAE = CausalVaeConfig(channels=4, width=4, multipliers=(1, 2), factors=(Grid(2, 2, 2),), blocks=1)
IMAGE_VAE = ImageVaeConfig(levels=ImageLevels(widths=(4, 8), blocks=1, groups=2))
VQ = VqConfig(
    network=ImageVaeConfig(channels=5, levels=ImageLevels(widths=(4, 8), blocks=1, groups=2)),
    codebook=CodebookConfig(codes=7, width=3),
)


def authors(folder, config, params):
    save_denoiser(folder, config, params, layout="authors")


def own(folder, config, params):
    write_native(folder, config, ParamsSource(params))


KINDS = {
    "Wan": (WAN, save_denoiser, load_denoiser),
    "Wan of its authors": (WAN, authors, load_denoiser),
    "DiT": (DIT, save_denoiser, load_denoiser),
    "DiT of its authors": (DIT, authors, load_denoiser),
    "our own": (dataclasses.replace(WAN, cond_channels=2), own, load_denoiser),
    "AutoencoderKLWan": (WAN_VAE, save_autoencoder, load_autoencoder),
    "AutoencoderKL": (IMAGE_VAE, save_autoencoder, load_autoencoder),
    "VQModel": (VQ, save_autoencoder, load_autoencoder),
    "T5": (T5, save_text_encoder, load_text_encoder),
    "CLIP": (CLIP, save_clip, load_clip),
}


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_every_loader_names_all_tensors_that_do_not_fit(tmp_path, kind):
    config, write, load = KINDS[kind]
    write(tmp_path, config, make_random_params(config.make))
    (file,) = tmp_path.glob("*.safetensors")
    tensors = safetensors.numpy.load_file(file)
    *lost, wrong = sorted(tensors)[:13]
    tensors |= {"surplus": np.zeros(1, np.float32), wrong: np.zeros((*tensors[wrong].shape, 2), tensors[wrong].dtype)}
    safetensors.numpy.save_file({name: array for name, array in tensors.items() if name not in lost}, file)
    with pytest.raises(UserError) as error:
        load(tmp_path)
    message = str(error.value)
    missing = message.split("12 missing (")[1].split(")")[0].split(", ")
    assert set(missing[:10]) < set(lost)
    assert missing[10:] == ["… 2 more"]
    assert "; 1 unexpected (surplus); " in message
    assert (
        f"; 1 misshapen ({wrong} {list(tensors[wrong].shape)} instead of {list(tensors[wrong].shape[:-1])}); "
        in message
    )
