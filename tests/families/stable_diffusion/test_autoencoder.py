"""Folders of `AutoencoderKL`, also older ones, are written, read again, and refused if they do not fit."""

import json

import numpy as np
import pytest
import safetensors.numpy

from dit_video.core.errors import UserError
from dit_video.core.trees import flatten
from dit_video.families import load_autoencoder, save_autoencoder
from dit_video.models.autoencoders import ImageLevels, ImageVaeConfig, PatchVaeConfig
from support.random_params import make_random_params

CONFIG = ImageVaeConfig(levels=ImageLevels(widths=(4, 8), blocks=1, groups=2))
PARTS = ImageVaeConfig(
    channels=3,
    levels=ImageLevels(widths=(4, 8), blocks=1, groups=2, middle_attention=False, attention=(1,)),
    use_quant_conv=False,
    use_post_quant_conv=False,
)
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def params():
    return make_random_params(CONFIG.make)


def equal(left, right):
    left, right = flatten(left), flatten(right)
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_array_equal(left[path], right[path], err_msg=path)
        assert left[path].dtype == right[path].dtype


def document(folder):
    return json.loads((folder / "config.json").read_text())


def edit(folder, **changes):
    (folder / "config.json").write_text(json.dumps(document(folder) | changes))


@pytest.mark.parametrize("config", [CONFIG, PARTS], ids=["whole", "parts"])
def test_round_trip_is_bit_exact(tmp_path, config):
    params = make_random_params(config.make)  # its normalisation differs from channel to channel
    save_autoencoder(tmp_path, config, params)
    read_config, read = load_autoencoder(tmp_path)
    assert read_config == config
    equal(read, params)


def test_the_names_and_layouts_are_diffusers(tmp_path, params):
    save_autoencoder(tmp_path, CONFIG, params)
    tensors = safetensors.numpy.load_file(tmp_path / FILE)
    assert tensors["encoder.down_blocks.0.downsamplers.0.conv.weight"].shape == (4, 4, 3, 3)
    assert tensors["encoder.down_blocks.1.resnets.0.conv_shortcut.weight"].shape == (8, 4, 1, 1)
    assert tensors["decoder.mid_block.attentions.0.to_out.0.weight"].shape == (8, 8)
    assert tensors["decoder.up_blocks.0.upsamplers.0.conv.weight"].shape == (8, 8, 3, 3)
    assert tensors["quant_conv.weight"].shape == (8, 8, 1, 1)
    assert document(tmp_path)["down_block_types"] == ["DownEncoderBlock2D"] * 2


@pytest.mark.parametrize(
    ("scale", "shift"), [(0.18215, None), (0.13025, None), (0.3611, 0.1159), (1.5305, 0.0609), (1 / 3, -7.0)]
)
def test_scale_and_shift_become_the_normalisation(tmp_path, params, scale, shift):
    save_autoencoder(tmp_path, CONFIG, params)
    edit(tmp_path, scaling_factor=scale, shift_factor=shift, latents_mean=None, latents_std=None)
    _, read = load_autoencoder(tmp_path)
    normalizer = read["normalizer"]
    latents = np.float32([1.25, -2.0, 0.1, 3.0])
    np.testing.assert_allclose(
        (latents - normalizer["mean"]) / normalizer["std"], (latents - (shift or 0.0)) * scale, rtol=1e-6
    )
    save_autoencoder(tmp_path / "again", CONFIG, read)
    again = document(tmp_path / "again")
    assert again["shift_factor"] == shift
    assert again["scaling_factor"] == scale or scale == 1 / 3  # which has more digits than a float32
    equal(load_autoencoder(tmp_path / "again")[1], read)


def test_means_and_deviations_of_channels_are_read(tmp_path, params):
    save_autoencoder(tmp_path, CONFIG, params)
    edit(tmp_path, scaling_factor=0.5, latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[8.0, 4.0, 2.0, 1.0])
    normalizer = load_autoencoder(tmp_path)[1]["normalizer"]
    np.testing.assert_array_equal(normalizer["mean"], [1, 2, 3, 4])
    np.testing.assert_array_equal(normalizer["std"], [16, 8, 4, 2])


def test_an_older_folder_with_other_tensor_names_is_read(tmp_path, params):
    """The linear maps of attention had other names."""
    save_autoencoder(tmp_path, CONFIG, params)
    older = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = safetensors.numpy.load_file(tmp_path / FILE)
    for now, before in older.items():
        tensors = {name.replace(now, before): tensor for name, tensor in tensors.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in tensors
    safetensors.numpy.save_file(tensors, tmp_path / FILE)
    # Absent settings of an older folder have the default of the class.
    settings = document(tmp_path)
    for name in ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"):
        del settings[name]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config, read = load_autoencoder(tmp_path)
    assert config == CONFIG
    equal(read, params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn=gelu is not supported, only silu"),
        ({"in_channels": 4}, "in_channels=4 is not supported"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 3}, "up_block_types=.* is not supported"),
        ({"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, "up_block_types=.* is not supported"),
        ({"norm_num_groups": 3}, "4 channels are not divisible by groups=3"),
        ({"scaling_factor": 0.0}, "scaling_factor=0.0 .*must not be zero"),
        ({"shift_factor": 0.1}, "without shift_factor"),
        ({"latents_std": None}, "use both latents_mean and latents_std"),
        ({"latents_mean": [0.0]}, "latents_mean has 1, latents_std 4 values for 4 channels"),
        ({"norm_type": "spatial"}, "not supported: norm_type"),
    ],
)
def test_unsupported_settings_are_refused(tmp_path, params, changes, message):
    save_autoencoder(tmp_path, CONFIG, params)
    edit(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers_per_block": 2}, r"missing \(.*resnets.*unexpected|missing"),
        ({"use_quant_conv": False}, r"2 unexpected \(quant_conv.bias"),
        ({"block_out_channels": [4, 4]}, r"misshapen \(decoder.conv_in.bias"),
    ],
)
def test_weights_of_another_architecture_are_refused(tmp_path, params, changes, message):
    save_autoencoder(tmp_path, CONFIG, params)
    edit(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        load_autoencoder(tmp_path)


def test_a_pickled_folder_is_refused_with_the_conversion(tmp_path, params):
    save_autoencoder(tmp_path, CONFIG, params)
    (tmp_path / FILE).rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"l\.AutoencoderKL\.from_pretrained"):
        load_autoencoder(tmp_path)


def test_configs_without_a_diffusers_class_are_not_written(tmp_path):
    with pytest.raises(UserError, match="no class for PatchVaeConfig"):
        save_autoencoder(tmp_path, PatchVaeConfig(), {})
