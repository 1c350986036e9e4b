"""The command that converts weights, as a user starts it."""

import numpy as np
from safetensors.numpy import load_file

import dit_video
from dit_video.families import load_autoencoder, load_denoiser
from dit_video.weights import load_metadata
from support.tiny_wan import DIT, TWO, VAE, write_wan
from support.torch_archives import write_torch_file

TOOL = "tools/convert.py"


def test_the_command_converts_a_part_to_another_dtype(tmp_path, script):
    write_wan(tmp_path / "wan")
    done = script(TOOL, tmp_path / "wan" / "transformer", tmp_path / "own", "--to", "dit_video", "--dtype", "bfloat16")
    assert done.code == 0, done.err
    assert "MB in 2 files" in done.out
    assert load_denoiser(tmp_path / "own")[0] == DIT
    again = script(TOOL, tmp_path / "wan" / "transformer", tmp_path / "own", "--to", "authors")
    assert again.code == 2
    assert "exists and is not empty" in again.err


def test_the_command_converts_pipelines_there_and_back(tmp_path, script):
    write_wan(tmp_path / "wan", **TWO)
    refused = script(TOOL, tmp_path / "wan", tmp_path / "none", "--to", "authors")
    assert refused.code == 2
    assert "convert each part: text_encoder, transformer, transformer_2, vae" in refused.err.replace("\n", " ")
    done = script(TOOL, tmp_path / "wan", tmp_path / "own", "--to", "dit_video")
    assert done.code == 0, done.err
    assert dit_video.load(tmp_path / "own").config.model.backbone == DIT
    back = script(TOOL, tmp_path / "own", tmp_path / "back", "--to", "diffusers")
    assert back.code == 0, back.err
    name = "diffusion_pytorch_model.safetensors"
    for part in ("transformer", "transformer_2", "vae"):
        assert (tmp_path / "back" / part / name).read_bytes() == (tmp_path / "wan" / part / name).read_bytes(), part
    assert load_autoencoder(tmp_path / "back" / "vae")[0] == VAE
    assert load_metadata(tmp_path / "back" / "vae" / name) == {"format": "pt"}


def test_the_command_refuses_an_unknown_class(tmp_path, script):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    done = script(TOOL, tmp_path, tmp_path / "out", "--to", "diffusers")
    assert done.code == 2
    assert "Supported classes are WanVACETransformer3DModel" in done.err.replace("\n", " ")


def test_the_command_reads_a_file_of_pytorch(tmp_path, script):
    source, destination = write_torch_file(tmp_path / "rgb_imagenet.pt"), tmp_path / "i3d.safetensors"
    done = script(TOOL, source, destination, "--to", "safetensors")
    assert done.code == 0, done.err
    np.testing.assert_array_equal(load_file(destination)["a.w"], np.arange(6, dtype=np.float32).reshape(2, 3).T)
    refused = script(TOOL, source, destination, "--to", "safetensors")
    assert refused.code == 2
    assert "it exists" in refused.err
