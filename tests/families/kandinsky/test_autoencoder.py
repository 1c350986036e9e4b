"""Folders of `VQModel` are written, read again, and refused if they do not fit."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy

from dit_video.core.errors import UserError
from dit_video.core.trees import flatten
from dit_video.families import load_autoencoder, save_autoencoder
from dit_video.models.autoencoders import CausalVaeConfig, CodebookConfig, ImageLevels, ImageVaeConfig, VqConfig
from support.random_params import make_random_params

PLAIN = VqConfig(
    network=ImageVaeConfig(channels=5, levels=ImageLevels(widths=(4, 8), blocks=1, groups=2)),
    codebook=CodebookConfig(codes=7, width=3),
)
MOVQ = VqConfig(
    network=ImageVaeConfig(channels=4, levels=ImageLevels(widths=(32,), blocks=1, attention=(0,))),
    codebook=CodebookConfig(codes=9, width=4),
    modulated=True,
    quantized_decoding=False,
)
FILE = "diffusion_pytorch_model.safetensors"


def document(folder):
    return json.loads((folder / "config.json").read_text())


def edit(folder, **changes):
    (folder / "config.json").write_text(json.dumps(document(folder) | changes))


@pytest.fixture(scope="module")
def params():
    return {config: make_random_params(config.make) for config in (PLAIN, MOVQ)}


@pytest.mark.parametrize(("config", "scale"), [(PLAIN, None), (MOVQ, 0.18215)], ids=["plain", "modulated"])
def test_round_trip_is_bit_exact(tmp_path, params, config, scale):
    tree = params[config]
    if scale is not None:
        one = {"mean": np.zeros(config.channels, np.float32), "std": np.full(config.channels, 1 / scale, np.float32)}
        tree = tree | {"normalizer": one}
    save_autoencoder(tmp_path, config, tree)
    read_config, read = load_autoencoder(tmp_path)
    assert read_config == config
    left, right = flatten(read), flatten(tree)
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_array_equal(left[path], right[path], err_msg=path)
    if scale is not None:  # settings that diffusers knows, without others
        assert document(tmp_path)["scaling_factor"] == scale
        assert not {"shift_factor", "latents_mean"} & document(tmp_path).keys()


def test_the_names_and_layouts_are_diffusers(tmp_path, params):
    save_autoencoder(tmp_path, MOVQ, params[MOVQ])
    tensors = safetensors.numpy.load_file(tmp_path / FILE)
    assert tensors["quantize.embedding.weight"].shape == (9, 4)
    assert tensors["quant_conv.weight"].shape == (4, 4, 1, 1)
    assert tensors["decoder.mid_block.attentions.0.spatial_norm.conv_y.weight"].shape == (32, 4, 1, 1)
    assert tensors["decoder.up_blocks.0.resnets.1.norm2.norm_layer.bias"].shape == (32,)
    assert tensors["decoder.conv_norm_out.conv_b.bias"].shape == (32,)
    assert tensors["encoder.down_blocks.0.attentions.0.group_norm.weight"].shape == (32,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_type": "layer"}, "norm_type=layer is not supported, only group, spatial"),
        ({"num_vq_embeddings": 0}, "codes=0 .*at least 1"),
        ({"num_vq_embeddings": 8}, r"quantize\.embedding\.weight"),
        ({"vq_embed_dim": 4}, r"quant_conv\.bias"),
        ({"norm_type": "spatial"}, r"latents of 5 channels can't modulate codes of 3\. Use one number"),
        ({"_class_name": "AutoencoderKL"}, "num_vq_embeddings"),
        ({"levels": 3}, "not supported: levels"),
    ],
)
def test_unsupported_settings_are_refused(tmp_path, params, changes, message):
    save_autoencoder(tmp_path, PLAIN, params[PLAIN])
    edit(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        load_autoencoder(tmp_path)


def test_weights_of_another_architecture_are_refused(tmp_path, params):
    save_autoencoder(tmp_path, MOVQ, params[MOVQ])
    edit(tmp_path, norm_type="group")
    with pytest.raises(UserError, match=r"24 missing \(decoder.*; 72 unexpected \(decoder\.conv_norm_out\.conv_b"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (VqConfig(network=CausalVaeConfig(width=4)), "a network of clips"),
        (dataclasses.replace(PLAIN, codebook=CodebookConfig(codes=7, width=3, spherical=True)), "spherical codebook"),
        (
            dataclasses.replace(PLAIN, modulated=True, quantized_decoding=False),
            "latents of 5 channels can't modulate codes of 3",
        ),
        (dataclasses.replace(PLAIN, quantized_decoding=False), "quantized_decoding=False can't be written: pipelines"),
        (dataclasses.replace(MOVQ, quantized_decoding=True), "quantized_decoding=True can't be written: pipelines"),
        (
            VqConfig(
                network=dataclasses.replace(PLAIN.network, channels=3),
                codebook=CodebookConfig(codes=7, width=3),
                modulated=True,
                quantized_decoding=False,
            ),
            "groups=2 .*modulated norms have 32 groups",
        ),
    ],
)
def test_configs_without_a_diffusers_class_are_not_written(tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        save_autoencoder(tmp_path, config, {})
