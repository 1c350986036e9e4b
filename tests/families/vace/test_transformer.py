"""Transformers of VACE are written in both layouts, read again, and refused if they do not fit."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from dit_video.core.errors import UserError
from dit_video.core.trees import flatten
from dit_video.families import get_lora_modules, load_denoiser, save_denoiser
from dit_video.models.backbones.vace import VaceDitConfig
from dit_video.nn import get_param_shapes, merge_lora
from dit_video.weights import get_native_modules, load_lora, save_lora
from support.random_params import make_random_params
from support.tiny_vace import CONFIG

FILE = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("layout", ["diffusers", "authors"])
def test_round_trip_is_bit_exact(tmp_path, layout):
    params = make_random_params(CONFIG.make)
    save_denoiser(tmp_path, CONFIG, params, layout=layout)
    result, read = load_denoiser(tmp_path)
    assert result == CONFIG
    assert jax.tree.structure(read) == jax.tree.structure(params)
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(flatten(read)[path], leaf, err_msg=path)


def test_the_names_and_layouts_are_diffusers(tmp_path):
    save_denoiser(tmp_path, CONFIG, make_random_params(CONFIG.make))
    tensors = safetensors.numpy.load_file(tmp_path / FILE)
    assert tensors["vace_patch_embedding.weight"].shape == (16, CONFIG.control.channels, 1, 2, 2)
    assert tensors["vace_blocks.1.proj_out.weight"].shape == (16, 16)
    assert [name for name in tensors if "proj_in" in name] == [
        "vace_blocks.0.proj_in.bias",
        "vace_blocks.0.proj_in.weight",
    ]
    assert "vace_blocks.1.attn1.norm_q.weight" in tensors


@pytest.mark.parametrize(
    ("config", "layers", "parameters"),
    [(VaceDitConfig.vace_1_3b(), range(0, 30, 2), 2.15e9), (VaceDitConfig.vace_14b(), range(0, 40, 5), 17.3e9)],
    ids=["1.3B", "14B"],
)
def test_published_sizes_have_the_published_settings(tmp_path, config, layers, parameters):
    shapes = get_param_shapes(config.make)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == pytest.approx(parameters, rel=0.02)
    assert config.hint_layers == tuple(layers)
    assert config.control.channels == 96


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("diffusers", {"vace_layers": [0, 1]}, r"vace_layers=\[0, 1\] is invalid: .* of the 4 .* Use .*\[0, 2\]"),
        ("diffusers", {"vace_layers": []}, r"vace_layers=\[\] is invalid: .* Use"),
        ("diffusers", {"vace_layers": [2, 0]}, r"vace_layers=\[2, 0\] is invalid: .* Use"),
        ("diffusers", {"vace_in_channels": 8}, "vace_in_channels=8 is invalid: .* need at least 9. Copy or download"),
        ("diffusers", {"vace_in_channels": 96}, "misshapen"),
        ("diffusers", {"image_dim": 8}, "image_dim=8 is not supported"),
        ("diffusers", {"vace_kind": 1}, "not supported: vace_kind"),
        ("authors", {"model_type": "i2v"}, "model_type=i2v is invalid: .* vace or t2v. Use another folder"),
    ],
)
def test_unsupported_settings_are_refused(tmp_path, layout, changes, message):
    save_denoiser(tmp_path, CONFIG, make_random_params(CONFIG.make), layout=layout)
    document = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(document | changes))
    with pytest.raises(UserError, match=message):
        load_denoiser(tmp_path)


def test_settings_that_the_authors_leave_out_have_their_defaults(tmp_path):
    """Hints after every second block, and as many control channels as latents, which leaves none for a mask."""
    save_denoiser(tmp_path, CONFIG, make_random_params(CONFIG.make), layout="authors")
    document = json.loads((tmp_path / "config.json").read_text())
    del document["vace_layers"]
    (tmp_path / "config.json").write_text(json.dumps(document | {"model_type": "t2v"}))
    assert load_denoiser(tmp_path)[0] == CONFIG
    del document["vace_in_dim"]
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"vace_in_dim=4 is invalid: .* Copy or download"):
        load_denoiser(tmp_path)


@pytest.mark.parametrize(
    ("style", "layout", "name"),
    [
        ("diffusers", "diffusers", "transformer.vace_blocks.1.attn1.to_q.lora_A.weight"),
        ("comfyui", "authors", "diffusion_model.vace_blocks.1.self_attn.q.lora_down.weight"),
        ("diffusers", "diffusers", "transformer.vace_blocks.1.proj_out.lora_A.weight"),
        ("comfyui", "authors", "diffusion_model.vace_blocks.0.before_proj.lora_down.weight"),
        ("diffusers", "dit_video", "transformer.control.blocks.1.query.lora_A.weight"),
    ],
)
def test_adapters_of_control_layers_are_read_and_written(tmp_path, style, layout, name):
    params, draw = make_random_params(CONFIG.make), np.random.default_rng(0)
    modules = get_native_modules(params) if layout == "dit_video" else get_lora_modules(CONFIG, primary_layout=layout)
    down, up = ("lora_A", "lora_B") if style == "diffusers" else ("lora_down", "lora_up")
    factors = {down: draw.normal(size=(2, 16)).astype(np.float32), up: draw.normal(size=(16, 2)).astype(np.float32)}
    tensors = {name.replace(down, part): factor for part, factor in factors.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "in.safetensors")
    adapter = load_lora(tmp_path / "in.safetensors", params, modules)
    before, changed = flatten(params), flatten(merge_lora(params, adapter, 1.0))
    (path,) = (path for path, leaf in before.items() if (np.asarray(changed[path]) != leaf).any())
    assert path.startswith("control/")
    difference = np.asarray(changed[path]) - before[path]
    if difference.ndim == 3:  # a stack of layers, of which the first is not adapted
        assert not difference[0].any()
        difference = difference[1]
    change = (factors[up] @ factors[down]).T
    if path.endswith("query/kernel") and layout != "dit_video":  # a head's pairs are neighbours in the files
        change = change.reshape(16, 2, 4, 2).swapaxes(2, 3).reshape(16, 16)
    np.testing.assert_allclose(difference, change, atol=1e-5)
    save_lora(tmp_path / "out.safetensors", adapter, modules, style=style)
    written = safetensors.numpy.load_file(tmp_path / "out.safetensors")
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(written[key], tensor, err_msg=key)
