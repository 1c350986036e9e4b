"""Transformers of LTX-Video are written, read again and refused if they do not fit; LoRAs go in and out."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dit_video.core.errors import UserError
from dit_video.core.trees import flatten
from dit_video.families import get_lora_modules, load_denoiser, save_denoiser
from dit_video.nn import merge_lora
from dit_video.tokens import Grid, rotate
from dit_video.weights import load_lora, save_lora
from support.random_params import make_random_params
from support.tiny_ltx import DIT

FILE = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("time_coordinate", ["seconds", "frame seconds"])
def test_round_trip_is_bit_exact(tmp_path, time_coordinate):
    """The coordinate, which differs between versions, is read from the folder alone, without its pipeline."""
    params, written = make_random_params(DIT.make), DIT.replace(time_coordinate=time_coordinate)
    save_denoiser(tmp_path, written, params)
    config, read = load_denoiser(tmp_path)
    assert config == written
    assert jax.tree.structure(read) == jax.tree.structure(params)
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(flatten(read)[path], leaf, err_msg=path)


def test_the_names_and_layouts_are_diffusers(tmp_path):
    save_denoiser(tmp_path, DIT, make_random_params(DIT.make))
    tensors = safetensors.numpy.load_file(tmp_path / FILE)
    assert tensors["proj_in.weight"].shape == (16, 4)
    assert tensors["transformer_blocks.1.ff.net.0.proj.weight"].shape == (64, 16)
    assert tensors["time_embed.linear.weight"].shape == (96, 16)
    assert tensors["scale_shift_table"].shape == (2, 16)


def test_a_heads_pairs_are_neighbours_in_the_files(tmp_path):
    params = make_random_params(DIT.make)
    save_denoiser(tmp_path, DIT, params)
    theirs = safetensors.numpy.load_file(tmp_path / FILE)["transformer_blocks.1.attn1.to_q.bias"].reshape(2, 4, 2)
    ours = np.asarray(params["blocks"]["query"]["bias"][1]).reshape(1, 2, 8)
    turned = (theirs[..., 0] + 1j * theirs[..., 1]) * np.exp(1j * np.arange(4.0))
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rotate(jnp.asarray(ours), jnp.arange(4.0)[None])[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": None}, "qk_norm=None is not supported"),
        ({"cross_attention_dim": 8}, "cross_attention_dim=8"),
        ({"out_channels": 8}, "out_channels=8"),
        ({"attention_bias": False}, "attention_bias=False"),
        ({"patch_size": 2}, "patch_size=2"),
        ({"audio_dim": 4}, "not supported: audio_dim"),
    ],
)
def test_unsupported_settings_are_refused(tmp_path, changes, message):
    save_denoiser(tmp_path, DIT, make_random_params(DIT.make))
    document = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(document | changes))
    with pytest.raises(UserError, match=message):
        load_denoiser(tmp_path)


def test_configs_that_the_class_cannot_express_are_not_written(tmp_path):
    for changes, message in (
        ({"patch": Grid(1, 2, 2)}, "patch=1x2x2 is invalid: .* Use 1x1x1, or the native layout"),
        ({"extents": (10.0, 64.0, 64.0)}, r"extents=\(10.0, .* Use \(20.0, 64.0, 64.0\), or"),
        ({"time": "segment"}, "time=segment is invalid: .* Use token, or the native layout"),
        ({"time_coordinate": "tokens"}, "time_coordinate=tokens is invalid: .* Use seconds or frame seconds, or"),
    ):
        with pytest.raises(UserError, match=message):
            save_denoiser(tmp_path, dataclasses.replace(DIT, **changes), {})
    with pytest.raises(UserError, match="layout=authors is invalid"):
        save_denoiser(tmp_path, DIT, {}, layout="authors")


@pytest.mark.parametrize(("layout", "style"), [("diffusers", "diffusers"), ("authors", "comfyui")])
def test_a_lora_adds_the_product_of_its_factors_and_is_written_as_it_was_read(tmp_path, layout, style):
    """The authors' names, as in ComfyUI's files, differ for some maps outside of the blocks."""
    prefix, first, second = {
        "diffusers": ("transformer", "lora_A", "lora_B"),
        "comfyui": ("diffusion_model", "lora_down", "lora_up"),
    }[style]
    names = {"transformer_blocks.1.attn1.to_q": "transformer_blocks.1.attn1.to_q", "proj_in": "patchify_proj"}
    draw, tensors, changes = np.random.default_rng(0), {}, {}
    for ours, theirs in names.items():
        shapes = (2, 4 if ours == "proj_in" else 16), (16, 2)
        a, b = (draw.normal(size=shape).astype(np.float32) for shape in shapes)
        module = f"{prefix}.{theirs if layout == 'authors' else ours}"
        tensors |= {f"{module}.{first}.weight": a, f"{module}.{second}.weight": b}
        changes[f"{ours}.weight"] = b @ a
    safetensors.numpy.save_file(tensors, tmp_path / "lora.safetensors")
    params, modules = make_random_params(DIT.make), get_lora_modules(DIT, primary_layout=layout)
    adapter = load_lora(tmp_path / "lora.safetensors", params, modules)
    save_denoiser(tmp_path / "before", DIT, params)
    save_denoiser(tmp_path / "after", DIT, merge_lora(params, adapter, 1.0))
    before, after = (safetensors.numpy.load_file(tmp_path / way / FILE) for way in ("before", "after"))
    for name, tensor in before.items():
        np.testing.assert_allclose(after[name] - tensor, changes.get(name, 0 * tensor), atol=1e-5, err_msg=name)
    save_lora(tmp_path / "again.safetensors", adapter, modules, style=style)
    again = safetensors.numpy.load_file(tmp_path / "again.safetensors")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again[name], tensor, err_msg=name)
