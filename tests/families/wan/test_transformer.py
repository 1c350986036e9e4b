"""Transformers of Wan are written in both layouts, read again, and refused if they do not fit."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dit_video.core.errors import MissingError, UserError
from dit_video.core.trees import flatten
from dit_video.families import load_denoiser, save_denoiser
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.nn import get_param_shapes
from dit_video.tokens import Grid, rotate
from support.random_params import make_random_params

CONFIG = WanDitConfig(channels=4, context_width=6, width=16, mlp_dim=24, layers=3, heads=2, time_width=8)
IMAGES = dataclasses.replace(CONFIG, cond_channels=5, image_width=7)
FIRST_AND_LAST = dataclasses.replace(IMAGES, image_positions=4)
FILE = "diffusion_pytorch_model.safetensors"


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for path, leaf in flatten(expected).items():
        np.testing.assert_array_equal(flatten(actual)[path], leaf, err_msg=path)


@pytest.mark.parametrize("layout", ["diffusers", "authors"])
@pytest.mark.parametrize("config", [CONFIG, IMAGES, FIRST_AND_LAST], ids=["text", "image", "first and last"])
def test_round_trip_is_bit_exact(tmp_path, config, layout):
    params = make_random_params(config.make)
    save_denoiser(tmp_path, config, params, layout=layout)
    result, read = load_denoiser(tmp_path)
    assert result == config
    assert_same(read, params)


def test_a_time_per_token_is_read_from_the_type_or_the_pipeline(tmp_path):
    config = dataclasses.replace(CONFIG, time="token")
    params = make_random_params(config.make)
    save_denoiser(tmp_path / "authors", config, params, layout="authors")
    assert load_denoiser(tmp_path / "authors")[0] == config
    save_denoiser(tmp_path / "pipeline" / "transformer", config, params)
    assert load_denoiser(tmp_path / "pipeline" / "transformer")[0].time == "segment"
    (tmp_path / "pipeline" / "model_index.json").write_text('{"expand_timesteps": true}')
    assert load_denoiser(tmp_path / "pipeline" / "transformer")[0] == config


def test_factors_of_positions_are_not_dropped_from_files(tmp_path):
    for name in ("position_scale", "position_stretch"):
        config = dataclasses.replace(CONFIG, **{name: (0.5, 1.0, 1.0)})
        with pytest.raises(UserError, match=rf"{name}=\(0.5, 1.0, 1.0\).* is invalid: .* Use \(1, 1, 1\)"):
            save_denoiser(tmp_path, config, make_random_params(config.make))


def test_the_names_and_layouts_are_diffusers(tmp_path):
    save_denoiser(tmp_path, IMAGES, make_random_params(IMAGES.make))
    tensors = safetensors.numpy.load_file(tmp_path / FILE)
    assert tensors["patch_embedding.weight"].shape == (16, 9, 1, 2, 2)
    assert tensors["blocks.2.attn2.add_k_proj.weight"].shape == (16, 16)
    assert tensors["blocks.0.ffn.net.0.proj.weight"].shape == (24, 16)
    assert tensors["scale_shift_table"].shape == (1, 2, 16)
    assert tensors["condition_embedder.image_embedder.norm1.weight"].shape == (7,)


def test_a_heads_pairs_are_neighbours_in_the_files(tmp_path):
    params = make_random_params(CONFIG.make)
    save_denoiser(tmp_path, CONFIG, params)
    theirs = safetensors.numpy.load_file(tmp_path / FILE)["blocks.1.attn1.to_q.bias"].reshape(2, 4, 2)
    ours = np.asarray(params["blocks"]["query"]["bias"][1]).reshape(1, 2, 8)
    angles = jnp.arange(4.0)[None]
    turned = (theirs[..., 0] + 1j * theirs[..., 1]) * np.exp(1j * np.arange(4.0))
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rotate(jnp.asarray(ours), angles)[0], expected, atol=1e-6)


def test_several_files_are_read_and_each_parameter_is_placed_at_once(tmp_path):
    params = make_random_params(CONFIG.make)
    save_denoiser(tmp_path, CONFIG, params, shard_bytes=4000)
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 2
    placed = []

    def place(path, parameter):
        placed.append((path, parameter.shape))
        return parameter.to_device()

    _, read = load_denoiser(tmp_path, place=place)
    assert_same(read, params)
    assert dict(placed) == {path: leaf.shape for path, leaf in flatten(get_param_shapes(CONFIG.make)).items()}
    next(tmp_path.glob("*-00002-of-*")).unlink()
    with pytest.raises(MissingError, match="lacks 1 of"):
        load_denoiser(tmp_path)


def test_the_dtype_of_the_file_is_kept_on_demand(tmp_path):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), make_random_params(CONFIG.make))
    save_denoiser(tmp_path / "in", CONFIG, params)
    config, read = load_denoiser(tmp_path / "in", dtype=None)
    assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {jnp.dtype("bfloat16")}
    save_denoiser(tmp_path / "out", config, read)
    assert (tmp_path / "out" / FILE).read_bytes() == (tmp_path / "in" / FILE).read_bytes()


def edit_tensors(folder, change):
    tensors = safetensors.numpy.load_file(folder / FILE)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / FILE)


def test_layers_of_several_dtypes_are_cast_or_refused(tmp_path):
    save_denoiser(tmp_path, CONFIG, make_random_params(CONFIG.make))
    name = "blocks.1.attn1.to_v.bias"
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: tensors[name].astype(np.float16)}))
    assert load_denoiser(tmp_path)[1]["blocks"]["value"]["bias"].dtype == np.float32
    with pytest.raises(UserError, match=r"layers of blocks/value/bias have dtypes float16, float32,.* dtype="):
        load_denoiser(tmp_path, dtype=None)


def test_the_first_ten_tensors_that_do_not_fit_are_named(tmp_path):
    save_denoiser(tmp_path, CONFIG, make_random_params(CONFIG.make))

    def change(tensors):
        for name in [name for name in tensors if name.startswith("blocks.1.")][:12]:
            del tensors[name]
        tensors["blocks.3.ffn.net.2.bias"] = np.zeros(16, np.float32)
        tensors["blocks.0.scale_shift_table"] = np.zeros((1, 6, 15), np.float32)

    edit_tensors(tmp_path, change)
    with pytest.raises(UserError) as error:
        load_denoiser(tmp_path)
    message = str(error.value)
    assert "12 missing (" in message
    assert "… 2 more)" in message
    assert "1 unexpected (blocks.3.ffn.net.2.bias)" in message
    assert "1 misshapen (blocks.0.scale_shift_table [1, 6, 15] instead of [1, 6, 16])" in message


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        (
            "diffusers",
            {"_class_name": "FluxTransformer2DModel"},
            "Supported classes are .*WanTransformer3DModel, WanModel",
        ),
        ("diffusers", {"qk_norm": None}, "qk_norm=None is not supported"),
        ("diffusers", {"cross_attn_norm": False}, "cross_attn_norm=False"),
        ("diffusers", {"eps": 1e-5}, "eps=1e-05"),
        ("diffusers", {"added_kv_proj_dim": 8}, "added_kv_proj_dim=8"),
        ("diffusers", {"vace_layers": [0]}, "not supported: vace_layers"),
        ("diffusers", {"num_attention_heads": 3}, "misshapen"),
        ("authors", {"model_type": "s2v"}, "model_type=s2v is not supported, only t2v, i2v, flf2v, ti2v"),
        ("authors", {"window_size": [8, 8]}, "window_size"),
    ],
)
def test_unsupported_settings_are_refused(tmp_path, layout, changes, message):
    save_denoiser(tmp_path, CONFIG, make_random_params(CONFIG.make), layout=layout)
    document = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(document | changes))
    with pytest.raises(UserError, match=message):
        load_denoiser(tmp_path)


def test_configs_that_a_layout_cannot_express_are_not_written(tmp_path):
    longer = dataclasses.replace(CONFIG, text_length=256)
    with pytest.raises(UserError, match="pads texts to 512 tokens, so text_length=256"):
        save_denoiser(tmp_path, longer, make_random_params(longer.make))
    save_denoiser(tmp_path / "authors", longer, make_random_params(longer.make), layout="authors")
    assert load_denoiser(tmp_path / "authors")[0] == longer
    thick = dataclasses.replace(CONFIG, patch=Grid(2, 2, 2))
    with pytest.raises(UserError, match="omit the patch"):
        save_denoiser(tmp_path, thick, make_random_params(thick.make), layout="authors")
    small = DiTConfig(channels=4, context_width=6)
    with pytest.raises(UserError, match="DiTTransformer2DModel without class labels"):
        save_denoiser(tmp_path, small, {})
