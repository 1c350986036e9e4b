"""DiT and SiT are written in both layouts, read again, and refused if they do not fit."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from dit_video.core.errors import UserError
from dit_video.core.trees import flatten
from dit_video.families import load_denoiser, save_denoiser
from dit_video.models.backbones.transformer import TimeEmbedding
from dit_video.tokens import Grid
from support.random_params import make_random_params
from support.tiny_class_dit import DIT, SIT

DIFFUSERS = dataclasses.replace(
    DIT, mlp_norm_eps=1e-5, time_embedding=TimeEmbedding(max_period=10_000 ** (128 / 127)), patch=Grid(1, 4, 4)
)
FILE = "diffusion_pytorch_model.safetensors"


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for path, leaf in flatten(expected).items():
        np.testing.assert_array_equal(flatten(actual)[path], leaf, err_msg=path)


def edit_tensors(folder, change):
    tensors = safetensors.numpy.load_file(folder / FILE)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / FILE)


@pytest.mark.parametrize(
    ("config", "layout"),
    [(DIT, "authors"), (SIT, "authors"), (DIFFUSERS, "diffusers")],
    ids=["DiT", "SiT", "diffusers"],
)
def test_round_trip_is_bit_exact(tmp_path, config, layout):
    for own in (config, dataclasses.replace(config, variance="none")):
        params = make_random_params(own.make)
        save_denoiser(tmp_path / own.variance, own, params, layout=layout, shard_bytes=9000)
        assert len(list((tmp_path / own.variance).glob("*-of-*.safetensors"))) > 1
        result, read = load_denoiser(tmp_path / own.variance)
        assert result == own
        assert_same(read, params)


def test_conversion_between_the_layouts_keeps_the_weights(tmp_path):
    params = make_random_params(DIT.make)
    save_denoiser(tmp_path / "diffusers", DIT, params)
    config, read = load_denoiser(tmp_path / "diffusers")
    assert config == dataclasses.replace(DIFFUSERS, patch=DIT.patch)
    assert_same(read, params)
    save_denoiser(tmp_path / "authors", config, read, layout="authors")
    result, again = load_denoiser(tmp_path / "authors")
    assert result == DIT
    assert_same(again, params)


def test_files_have_the_tensor_names_and_shapes_of_each_layout(tmp_path):
    params = make_random_params(DIT.make)
    save_denoiser(tmp_path / "authors", DIT, params, layout="authors")
    theirs = safetensors.numpy.load_file(tmp_path / "authors" / FILE)
    assert theirs["x_embedder.proj.weight"].shape == (16, 3, 2, 2)
    assert theirs["pos_embed"].shape == (1, 16, 16)
    assert theirs["final_layer.linear.weight"].shape == (24, 16)
    np.testing.assert_array_equal(theirs["blocks.1.attn.qkv.weight"], params["blocks"]["qkv"]["kernel"][1].T)
    save_denoiser(tmp_path / "diffusers", DIT, params)
    theirs = safetensors.numpy.load_file(tmp_path / "diffusers" / FILE)
    assert "pos_embed" not in theirs
    keys = theirs["transformer_blocks.1.attn1.to_k.weight"]
    np.testing.assert_array_equal(keys, params["blocks"]["qkv"]["kernel"][1][:, 16:32].T)
    copies = [f"transformer_blocks.{layer}.norm1.emb.timestep_embedder.linear_1.weight" for layer in range(2)]
    np.testing.assert_array_equal(theirs[copies[0]], theirs[copies[1]])


def test_the_position_table_is_the_authors_and_others_are_refused(tmp_path):
    save_denoiser(tmp_path, DIT, make_random_params(DIT.make), layout="authors")
    table = safetensors.numpy.load_file(tmp_path / FILE)["pos_embed"].reshape(4, 4, 16)
    positions = np.float64([3 / 1, 3 / 10, 3 / 100, 3 / 1000])
    np.testing.assert_array_equal(
        table[1, 3, :8], np.concatenate([np.sin(positions), np.cos(positions)]).astype(np.float32)
    )
    np.testing.assert_array_equal(
        table[3, 1, 8:], np.concatenate([np.sin(positions), np.cos(positions)]).astype(np.float32)
    )
    edit_tensors(tmp_path, lambda tensors: tensors.update(pos_embed=tensors["pos_embed"] + 1e-3))
    with pytest.raises(UserError, match="pos_embed differs from the table"):
        load_denoiser(tmp_path)


def test_the_dtype_of_the_file_is_kept_on_demand(tmp_path):
    params = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), make_random_params(SIT.make))
    save_denoiser(tmp_path / "in", SIT, params, layout="authors")
    config, read = load_denoiser(tmp_path / "in", dtype=None)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(read)} == {"bfloat16"}
    save_denoiser(tmp_path / "out", config, read, layout="authors")
    assert (tmp_path / "out" / FILE).read_bytes() == (tmp_path / "in" / FILE).read_bytes()


@pytest.mark.nightly
@pytest.mark.parametrize(("kind", "config"), [("DiT", DIT), ("SiT", SIT)])
def test_a_checkpoint_file_is_recognised_by_its_name(tmp_path, kind, config):
    config = dataclasses.replace(config, width=384, heads=6, layers=12, channels=1, mlp_ratio=4.0)
    params = make_random_params(config.make)
    save_denoiser(tmp_path, config, params, layout="authors")
    path = (tmp_path / FILE).rename(tmp_path / f"{kind}-S-2-256x256.safetensors")
    result, read = load_denoiser(path)
    assert result == config
    assert_same(read, params)
    with pytest.raises(UserError, match=r"does not name its model.*DiT-XL-2-256x256"):
        load_denoiser(path.rename(tmp_path / "model.safetensors"))


def test_pickles_are_refused_with_the_command(tmp_path):
    path = tmp_path / "DiT-XL-2-256x256.pt"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match=r"pickled file.*s\.save_file\(torch\.load\('DiT-XL-2-256x256\.pt'"):
        load_denoiser(path)


def test_a_folder_with_the_older_class_name_is_read(tmp_path):
    """`Transformer2DModel` is the former name of the class, which had more settings."""
    save_denoiser(tmp_path, DIFFUSERS, make_random_params(DIFFUSERS.make))
    document = json.loads((tmp_path / "config.json").read_text())
    older = {"_class_name": "Transformer2DModel", "cross_attention_dim": None, "use_linear_projection": False}
    (tmp_path / "config.json").write_text(json.dumps(document | older))
    assert load_denoiser(tmp_path)[0] == DIFFUSERS
    (tmp_path / "config.json").write_text(json.dumps({**document, **older, "norm_type": "ada_norm_single"}))
    with pytest.raises(UserError, match="norm_type=ada_norm_single"):
        load_denoiser(tmp_path)


def test_shared_embedders_whose_copies_differ_are_refused(tmp_path):
    save_denoiser(tmp_path, DIT, make_random_params(DIT.make))
    name = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: tensors[name] + 1}))
    with pytest.raises(UserError, match=r"blocks\.1\.norm1\.emb\.class_embedder.* differs from .*blocks\.0"):
        load_denoiser(tmp_path)


def test_layers_of_several_dtypes_are_cast_or_refused(tmp_path):
    save_denoiser(tmp_path, DIT, make_random_params(DIT.make), layout="authors")
    name = "blocks.1.mlp.fc1.bias"
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: tensors[name].astype(np.float16)}))
    assert load_denoiser(tmp_path)[1]["blocks"]["up"]["bias"].dtype == np.float32
    with pytest.raises(UserError, match=r"layers of blocks/up/bias have dtypes float16, float32,.* dtype="):
        load_denoiser(tmp_path, dtype=None)


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("authors", {"class_dropout_prob": 0.0}, "class_dropout_prob=0.0"),
        ("authors", {"depth": 4}, r"20 missing \(.*… 10 more\)"),
        ("authors", {"input_size": 9}, "9x9 latents are not divisible by the patch size 2"),
        ("authors", {"uncond": 1}, "not supported: uncond"),
        ("diffusers", {"attention_bias": False}, "attention_bias=False"),
        ("diffusers", {"out_channels": 5}, "out_channels=5"),
        (
            "diffusers",
            {"_class_name": "UViT2DModel"},
            r"class UViT2DModel\. Supported classes are .*DiTTransformer2DModel.*DiT, SiT",
        ),
    ],
)
def test_unsupported_settings_are_refused(tmp_path, layout, changes, message):
    save_denoiser(tmp_path, DIT, make_random_params(DIT.make), layout=layout)
    document = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(document | changes))
    with pytest.raises(UserError, match=message):
        load_denoiser(tmp_path)


@pytest.mark.parametrize(
    ("config", "layout", "message"),
    [
        (SIT, "diffusers", r"a SiT can't be written .*Use the authors' layout"),
        (dataclasses.replace(DIT, qk_norm="head"), "authors", "DiT does not support .* qk_norm"),
        (dataclasses.replace(DIT, mlp_ratio=2.0), "diffusers", "DiTTransformer2DModel does not support .* mlp_ratio"),
        (dataclasses.replace(DIT, patch=Grid(2, 2, 2)), "authors", "DiT does not support .* patch"),
        (dataclasses.replace(DIT, absolute_position=None), "authors", "class labels and sine-cosine image positions"),
    ],
)
def test_configs_that_a_layout_cannot_express_are_not_written(tmp_path, config, layout, message):
    with pytest.raises(UserError, match=message):
        save_denoiser(tmp_path, config, {}, layout=layout)
