"""Autoencoders are written in the layout of diffusers, read again, and refused if they do not fit."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from dit_video.core.errors import MissingError, UserError
from dit_video.families import load_autoencoder, save_autoencoder
from dit_video.models.autoencoders import CausalVaeConfig
from dit_video.tokens import Grid
from support.random_params import make_random_params

CONFIG = CausalVaeConfig(channels=4, width=4, multipliers=(1, 2), factors=(Grid(2, 2, 2),), blocks=1)
SHORTCUTS = CausalVaeConfig(
    channels=4,
    width=4,
    decoder_width=6,
    multipliers=(1, 2, 2),
    factors=(Grid(1, 2, 2), Grid(2, 2, 2)),
    patch=2,
    shortcuts=True,
)
FILE = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("config", [CONFIG, SHORTCUTS], ids=["plain", "shortcuts"])
def test_round_trip_is_bit_exact(tmp_path, config):
    params = make_random_params(config.make)
    save_autoencoder(tmp_path, config, params)
    read_config, read = load_autoencoder(tmp_path)
    assert read_config == config
    assert jax.tree.structure(read) == jax.tree.structure(params)
    for left, right in zip(jax.tree.leaves(read), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(left, right)


def test_the_names_and_layouts_are_diffusers(tmp_path):
    save_autoencoder(tmp_path, CONFIG, make_random_params(CONFIG.make))
    tensors = safetensors.numpy.load_file(tmp_path / FILE)
    assert tensors["encoder.down_blocks.1.resample.1.weight"].shape == (4, 4, 3, 3)
    assert tensors["encoder.down_blocks.1.time_conv.weight"].shape == (4, 4, 3, 1, 1)
    assert tensors["encoder.down_blocks.2.conv_shortcut.weight"].shape == (8, 4, 1, 1, 1)
    assert tensors["decoder.mid_block.attentions.0.norm.gamma"].shape == (8, 1, 1)
    assert tensors["decoder.up_blocks.0.upsamplers.0.time_conv.weight"].shape == (16, 8, 3, 1, 1)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    save_autoencoder(tmp_path, CONFIG, make_random_params(CONFIG.make))
    tensors = safetensors.numpy.load_file(tmp_path / FILE)
    del tensors["quant_conv.weight"]
    tensors["decoder.conv_in.bias"] = np.zeros(5, np.float32)
    tensors["more"] = np.zeros(1, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / FILE)
    with pytest.raises(UserError, match=r"1 missing \(quant_conv.weight\); 1 unexpected \(more\); 1 misshapen"):
        load_autoencoder(tmp_path)


def test_an_autoencoder_in_several_files_is_read_by_its_index(tmp_path):
    params = make_random_params(CONFIG.make)
    save_autoencoder(tmp_path, CONFIG, params, shard_bytes=2000)
    assert not (tmp_path / FILE).exists()
    assert len(list(tmp_path.glob("diffusion_pytorch_model-*.safetensors"))) > 2
    _, read = load_autoencoder(tmp_path)
    np.testing.assert_array_equal(read["encoder"]["conv_in"]["kernel"], params["encoder"]["conv_in"]["kernel"])
    next(tmp_path.glob("*-00002-of-*")).unlink()
    with pytest.raises(MissingError, match="lacks 1 of"):
        load_autoencoder(tmp_path)


def edit_config(folder, **changes):
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"_class_name": "AutoencoderTiny"},
            r"class AutoencoderTiny\. Supported classes are AutoencoderKLWan, AutoencoderKL",
        ),
        ({"attn_scales": [0.5]}, "attn_scales"),
        ({"use_more": 1}, "not supported: use_more"),
        ({"latents_mean": [0.0]}, "latents_mean has 1 values for 4 channels"),
    ],
)
def test_unsupported_configs_are_refused(tmp_path, changes, message):
    save_autoencoder(tmp_path, CONFIG, make_random_params(CONFIG.make))
    edit_config(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        load_autoencoder(tmp_path)


def test_a_pickled_folder_is_refused_with_the_conversion(tmp_path):
    save_autoencoder(tmp_path, CONFIG, make_random_params(CONFIG.make))
    (tmp_path / FILE).rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="convert it where torch is installed"):
        load_autoencoder(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(MissingError):
        load_autoencoder(tmp_path / "none")
