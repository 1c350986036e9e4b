import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dit_video.core.errors import MissingError, UserError
from dit_video.core.trees import count_values, flatten
from dit_video.nn import get_param_shapes
from dit_video.weights import (
    load_clip,
    load_clip_text,
    load_clip_vision,
    read_clip_text_config,
    read_clip_vision_config,
    save_clip,
)
from support.marks import mark_slow_except
from support.tiny_clip import CONFIG, TEXT, VISION, write_clip
from support.tiny_t5 import change_json, write_encoder

BARE_TEXT, BARE_VISION = (dataclasses.replace(config, projection=None) for config in (TEXT, VISION))
KINDS = {
    "CLIPModel": (CONFIG, load_clip),
    "CLIPTextModel": (BARE_TEXT, load_clip_text),
    "CLIPTextModelWithProjection": (TEXT, load_clip_text),
    "CLIPVisionModel": (BARE_VISION, load_clip_vision),
    "CLIPVisionModelWithProjection": (VISION, load_clip_vision),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a folder with both towers, to be read only."""
    folder = tmp_path_factory.mktemp("model")
    write_clip(folder)
    return folder


@pytest.fixture
def copied(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    return tmp_path / "model"


def load_tensors(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def rewrite(folder, tensors):
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, a), b in zip(flatten(left).items(), flatten(right).values(), strict=True):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(a, b, err_msg=path)


@pytest.mark.parametrize("name", mark_slow_except([name for name in KINDS if name != "CLIPModel"], KINDS))
def test_a_round_trip_is_bit_exact(tmp_path, name):
    config, load = KINDS[name]
    params = write_clip(tmp_path / "a", config)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["architectures"] == [name]
    loaded = load(tmp_path / "a")
    assert loaded.config == config
    assert loaded.ignored == ()
    assert_same(loaded.params, params)
    save_clip(tmp_path / "b", loaded.config, loaded.params)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    save_clip(tmp_path / "split", config, params, shard_bytes=3000)
    assert len(list((tmp_path / "split").glob("model-*-of-*.safetensors"))) > 2
    assert_same(load(tmp_path / "split").params, params)
    assert load(tmp_path / "split").digest == loaded.digest


def test_each_tower_is_read_from_a_folder_of_both(model):
    both, text, vision = load_clip(model), load_clip_text(model), load_clip_vision(model)
    assert (text.config, vision.config) == (TEXT, VISION)
    assert_same(text.params, both.params["text"])
    assert_same(vision.params, both.params["vision"])
    assert {*text.ignored, *vision.ignored} == load_tensors(model).keys()
    assert "logit_scale" in text.ignored
    assert "logit_scale" in vision.ignored


def test_the_names_are_those_of_transformers(tmp_path):
    params = write_clip(tmp_path)
    tensors = load_tensors(tmp_path)
    assert len(tensors) == 1 + (4 + 1 + 2 * 16) + (7 + 1 + 3 * 16)
    kernel = params["text"]["blocks"]["query"]["kernel"]
    np.testing.assert_array_equal(tensors["text_model.encoder.layers.1.self_attn.q_proj.weight"], kernel[1].T)
    patches = tensors["vision_model.embeddings.patch_embedding.weight"]
    np.testing.assert_array_equal(patches, params["vision"]["patch_kernel"].transpose(3, 2, 0, 1))
    assert tensors["vision_model.pre_layrnorm.bias"].shape == (12,)
    assert tensors["visual_projection.weight"].shape == (6, 12)


@pytest.mark.parametrize(("name", "root"), [("CLIPTextModel", "text_model."), ("CLIPVisionModel", "vision_model.")])
def test_a_single_tower_is_read_with_and_without_its_root_name(tmp_path, name, root):
    config, load = KINDS[name]
    params = write_clip(tmp_path, config)
    nested, tensors = load(tmp_path), load_tensors(tmp_path)
    assert all(key.startswith(root) for key in tensors)
    rewrite(tmp_path, {key.removeprefix(root): value for key, value in tensors.items()})
    assert_same(load(tmp_path).params, params)
    assert load(tmp_path).digest == nested.digest


def test_lists_of_positions_in_old_folders_are_left_out(copied):
    tensors = load_tensors(copied)
    added = [f"{tower}_model.embeddings.position_ids" for tower in ("text", "vision")]
    rewrite(copied, tensors | {name: np.arange(12)[None] for name in added})
    loaded = load_clip(copied)
    assert sorted(loaded.ignored) == added
    assert loaded.digest == load_clip(copied).digest


def test_bfloat16_is_for_kernels_and_embeddings_alone(model):
    params = load_clip(model, dtype="bfloat16").params
    for path, leaf in flatten(params).items():
        half = path.endswith(("kernel", "embedding"))
        assert leaf.dtype == (jnp.bfloat16 if half else jnp.float32), path
    assert load_clip_text(model, dtype="bfloat16").config.dtype == "bfloat16"


def test_towers_are_found_in_the_folder_of_a_pipeline(tmp_path):
    text, vision = write_clip(tmp_path / "text_encoder", BARE_TEXT), write_clip(tmp_path / "image_encoder", BARE_VISION)
    assert_same(load_clip_text(tmp_path).params, text)
    assert_same(load_clip_vision(tmp_path).params, vision)
    assert read_clip_vision_config(tmp_path) == BARE_VISION


def test_one_error_names_all_kinds_of_difference(copied):
    tensors = load_tensors(copied)
    del tensors["text_projection.weight"], tensors["logit_scale"]
    tensors["vision_model.post_layernorm.bias"] = np.ones(5, np.float32)
    added = [f"vision_model.encoder.layers.{layer}.layer_norm1.bias" for layer in range(3, 15)]
    rewrite(copied, tensors | {name: np.ones(12, np.float32) for name in added})
    with pytest.raises(UserError) as caught:
        load_clip(copied)
    message = str(caught.value)
    assert "2 missing (logit_scale, text_projection.weight)" in message
    assert "1 misshapen (vision_model.post_layernorm.bias [5] instead of [12])" in message
    assert "12 unexpected (vision_model.encoder.layers.10.layer_norm1.bias" in message
    assert "… 2 more)" in message
    assert "\n" not in message
    with pytest.raises(UserError, match=r"1 missing \(text_projection.weight\); use"):
        load_clip_text(copied)


def test_folders_of_other_classes_are_refused(copied, tmp_path):
    write_clip(tmp_path / "vision", VISION)
    listed = r"Supported are CLIPModel \('clip'\), CLIPTextModel \('clip_text_model'\), CLIPTextModelWithProjection"
    with pytest.raises(UserError, match=f"class CLIPVisionModelWithProjection .*{listed}"):
        load_clip_text(tmp_path / "vision")
    with pytest.raises(UserError, match=r"Supported are CLIPModel \('clip'\)$"):
        load_clip(tmp_path / "vision")
    write_encoder(tmp_path / "t5")
    with pytest.raises(
        UserError, match=r"model_type='umt5'\. Supported CLIP models are clip, clip_text_model, clip_vision_model"
    ):
        load_clip(tmp_path / "t5")
    change_json(copied / "config.json", architectures=["CLIPForImageClassification"])
    with pytest.raises(UserError, match="class CLIPForImageClassification and model_type='clip'"):
        load_clip_vision(copied)
    change_json(copied / "config.json", architectures=None)
    with pytest.raises(UserError, match="class None"):
        load_clip(copied)
    with pytest.raises(MissingError, match=r"no such file: .*config.json"):
        load_clip(tmp_path)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (TEXT, {"hidden_act": "relu"}, r"hidden_act='relu'\. Supported are quick_gelu and gelu"),
        (TEXT, {"eos_token_id": [1, 2]}, r"eos_token_id=\[1, 2\], .*single token id"),
        (TEXT, {"num_attention_heads": 3}, "not a valid config of a clip_text_model model"),
        (TEXT, {"hidden_size": "wide"}, "not a valid config of a clip_text_model model"),
        (VISION, {"num_channels": 4}, r"num_channels=4\. Only .*num_channels=3"),
        (VISION, {"image_size": [12, 16]}, r"image_size=\[12, 16\]\. Only squares"),
        (VISION, {"patch_size": 5}, "patch=5"),
    ],
)
def test_unsupported_settings_are_refused(tmp_path, config, change, message):
    write_clip(tmp_path, config)
    change_json(tmp_path / "config.json", **change)
    with pytest.raises(UserError, match=message) as caught:
        (load_clip_text if config is TEXT else load_clip_vision)(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_published_config_of_wans_image_encoder_is_read(tmp_path):
    """The config.json is the published one, and the encoder has the published size."""
    values = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_act": "gelu"}
    values |= {"hidden_size": 1280, "image_size": 224, "intermediate_size": 5120, "num_attention_heads": 16}
    values |= {"num_hidden_layers": 32, "patch_size": 14, "projection_dim": 1024, "torch_dtype": "float32"}
    values |= {"attention_dropout": 0.0, "dropout": 0.0, "initializer_factor": 1.0, "num_channels": 3}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = read_clip_vision_config(tmp_path)
    assert (config.tokens, config.activation, config.projection) == (257, "gelu", None)
    assert count_values(get_param_shapes(config.make)) == 630_766_080


def test_the_published_config_of_openais_text_tower_is_read(tmp_path):
    """The config.json of clip-vit-large-patch14 repeats settings and has a wrong end token."""
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    text |= {"projection_dim": 768, "eos_token_id": 2, "bos_token_id": 0, "hidden_act": "quick_gelu"}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
    vision |= {"patch_size": 14, "image_size": 224, "projection_dim": 768}
    values = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 768, "text_config": text}
    values |= {"text_config_dict": text, "vision_config": vision, "vision_config_dict": vision}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = read_clip_text_config(tmp_path)
    assert (config.vocabulary, config.positions, config.end_token, config.projection) == (49408, 77, 2, 768)
    assert count_values(get_param_shapes(config.make)) == 123_650_304
    assert read_clip_vision_config(tmp_path).projection == 768
