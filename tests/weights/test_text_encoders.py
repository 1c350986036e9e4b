"""Text encoders and embedders in folders of transformers."""

import dataclasses
import json
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from dit_video.core.errors import MissingError, UserError
from dit_video.core.trees import count_values, flatten
from dit_video.models.encoders import PretrainedTokenizer
from dit_video.nn import get_graph_def, get_param_shapes
from dit_video.weights import (
    load_clip_text,
    load_embedder,
    load_text_encoder,
    read_t5_config,
    read_text_encoder_config,
    save_clip,
    save_text_encoder,
)
from support import tiny_clip
from support.random_params import make_random_params
from support.tiny_t5 import CONFIG, change_json, write_encoder, write_tokenizer

SHARED = dataclasses.replace(CONFIG, activation="relu", position_bias="shared")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a folder with a UMT5 and its tokenizer, to be read only."""
    folder = tmp_path_factory.mktemp("model")
    write_encoder(folder)
    write_tokenizer(folder)
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


@pytest.mark.parametrize("config", [CONFIG, SHARED], ids=["umt5", "t5"])
def test_a_round_trip_is_bit_exact(tmp_path, config):
    params = write_encoder(tmp_path / "a", config)
    loaded = load_text_encoder(tmp_path / "a")
    assert loaded.config == config
    assert loaded.ignored == ()
    assert_same(loaded.params, params)
    save_text_encoder(tmp_path / "b", loaded.config, loaded.params)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_large_file_is_split(tmp_path):
    params = write_encoder(tmp_path / "whole")
    save_text_encoder(tmp_path / "split", CONFIG, params, shard_bytes=4000)
    assert len(list((tmp_path / "split").glob("model-*-of-*.safetensors"))) > 2
    whole, split = map(load_text_encoder, (tmp_path / "whole", tmp_path / "split"))
    assert_same(split.params, params)
    assert split.digest == whole.digest
    other = make_random_params(CONFIG.make, 1)
    save_text_encoder(tmp_path / "whole", CONFIG, other, shard_bytes=4000)  # over the single file
    assert_same(load_text_encoder(tmp_path / "whole").params, other)


def test_the_names_are_those_of_transformers(tmp_path):
    params = write_encoder(tmp_path, SHARED)
    tensors = load_tensors(tmp_path)
    block = "encoder.block.1.layer."
    assert len(tensors) == 2 + 1 + 2 * 8
    kernel = params["blocks"]["query"]["kernel"]
    np.testing.assert_array_equal(tensors[f"{block}0.SelfAttention.q.weight"], kernel[1].T)
    assert tensors[f"{block}1.DenseReluDense.wi.weight"].shape == (24, 16)
    table = tensors["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    np.testing.assert_array_equal(table, params["position"]["table"])
    assert f"{block}0.SelfAttention.relative_attention_bias.weight" not in tensors


def test_bfloat16_files_round_trip_and_keep_norms_in_float32(tmp_path):
    params = write_encoder(tmp_path / "a")
    save_text_encoder(tmp_path / "a", CONFIG, params, dtype=jnp.bfloat16)
    loaded = load_text_encoder(tmp_path / "a", dtype="bfloat16")
    assert loaded.config.dtype == "bfloat16"
    stored = {path: leaf.dtype for path, leaf in flatten(loaded.params).items()}
    for path, dtype in stored.items():
        assert dtype == (jnp.float32 if path.endswith(("scale", "table")) else jnp.bfloat16), path
    save_text_encoder(tmp_path / "b", loaded.config, loaded.params, dtype=jnp.bfloat16)
    name = "model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    widened = load_text_encoder(tmp_path / "a").params
    kernel = np.asarray(params["blocks"]["up"]["kernel"]).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(widened["blocks"]["up"]["kernel"], kernel)


def test_files_of_any_layout_are_one_encoder(copied):
    whole, tensors = load_text_encoder(copied), load_tensors(copied)
    (copied / "model.safetensors").unlink()
    names, files = sorted(tensors), {}
    for number in range(3):
        file = f"model-0000{number + 1}-of-00003.safetensors"
        part = names[number::3]
        files |= dict.fromkeys(part, file)
        safetensors.numpy.save_file({name: tensors[name] for name in part}, copied / file)
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    sharded = load_text_encoder(copied)
    assert_same(sharded.params, whole.params)
    assert sharded.digest == whole.digest
    for name in ("decoder.block.0.layer.0.layer_norm.weight", "lm_head.weight"):
        tensors[name] = np.ones(3, np.float32)
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    rewrite(copied, tensors)
    full = load_text_encoder(copied)
    assert_same(full.params, whole.params)
    assert full.digest == whole.digest
    assert sorted(full.ignored) == ["decoder.block.0.layer.0.layer_norm.weight", "lm_head.weight"]


def test_an_embedding_under_both_names_is_one(copied):
    tensors = load_tensors(copied)
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].copy()
    rewrite(copied, tensors)
    load_text_encoder(copied)
    tensors["encoder.embed_tokens.weight"][0, 0] += 1
    rewrite(copied, tensors)
    with pytest.raises(UserError, match=r"different values in shared.weight and encoder.embed_tokens.weight"):
        load_text_encoder(copied)
    del tensors["encoder.embed_tokens.weight"], tensors["shared.weight"]
    rewrite(copied, tensors)
    with pytest.raises(UserError, match=r"1 missing \(shared.weight\)"):
        load_text_encoder(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "clip_text_model"}, r"model_type='clip_text_model'\. Supported T5 encoders are t5, umt5"),
        ({"model_type": None}, "model_type=None"),
        ({"feed_forward_proj": "gated-silu"}, r"feed_forward_proj='gated-silu'\. Supported are gated-gelu and relu"),
        ({"feed_forward_proj": "a-b-c"}, "is not a valid config of a umt5 model"),
        ({"d_model": "wide"}, "is not a valid config of a umt5 model"),
        ({"num_heads": 0}, "heads=0 is invalid: it must be at least 1"),
    ],
)
def test_unsupported_configs_are_refused(copied, change, message):
    change_json(copied / "config.json", **change)
    with pytest.raises(UserError, match=message) as caught:
        load_text_encoder(copied)
    assert "\n" not in str(caught.value)


def test_absent_settings_have_the_defaults_of_transformers(tmp_path):
    standard = dataclasses.replace(SHARED, buckets=32, max_distance=128)
    write_encoder(tmp_path, standard)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("relative_attention_max_distance", "layer_norm_epsilon", "feed_forward_proj", "architectures"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_text_encoder(tmp_path).config == standard


def test_weights_are_read_one_parameter_at_a_time(tmp_path):
    config = dataclasses.replace(CONFIG, width=256, mlp_width=512, layers=6)
    write_encoder(tmp_path, config)
    load_text_encoder(tmp_path)  # imports and tracing of the first time do not count
    tracemalloc.start()
    params = load_text_encoder(tmp_path).params
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    # Copies of JAX are not counted. All tensors in a dictionary, then stacked, would take the sum and the largest.
    assert max(sizes) < peak < sum(sizes) + 0.5 * max(sizes)


def test_the_published_config_of_wans_text_encoder_is_read(tmp_path):
    """The config.json has settings of several versions of `transformers`, and the encoder has the published size."""
    values = {"model_type": "umt5", "architectures": ["UMT5EncoderModel"], "d_model": 4096, "d_ff": 10240, "d_kv": 64}
    values |= {"num_heads": 64, "num_layers": 24, "vocab_size": 256384, "feed_forward_proj": "gated-gelu"}
    values |= {"dense_act_fn": "gelu_new", "is_gated_act": True, "scalable_attention": True, "output_past": True}
    values |= {"relative_attention_num_buckets": 32, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    values |= {"transformers_version": "4.48.0.dev0", "tokenizer_class": "T5Tokenizer", "_name_or_path": "umt5-xxl"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = read_t5_config(tmp_path)
    assert (config.activation, config.position_bias, config.max_distance, config.eps) == (
        "gated-gelu",
        "each layer",
        128,
        1e-6,
    )
    assert count_values(get_param_shapes(config.make)) == 5_680_910_336


def test_a_folder_without_an_encoder_is_refused(tmp_path):
    with pytest.raises(MissingError, match=r"no such file: .*config.json"):
        load_text_encoder(tmp_path)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Return a folder with a CLIP and its tokenizer, to be read only."""
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip.write_clip(folder)
    tiny_clip.write_tokenizer(folder)
    return folder


def test_an_embedder_is_loaded_from_a_folder(model, tmp_path):
    embed = load_embedder(model, max_tokens=16, cache=tmp_path)
    assert (embed.width, embed.max_tokens) == (16, 16)
    assert embed("red ball").shape == (3, 16)
    assert [path.name for path in tmp_path.iterdir()] == [embed.identity]


def test_an_embedder_is_loaded_from_a_pipeline_folder(model, tmp_path):
    shutil.copytree(model, tmp_path / "text_encoder", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(
        MissingError, match=r"no tokenizer.json, spiece.model, or vocab.json .* in .*text_encoder or .*tokenizer"
    ):
        load_embedder(tmp_path / "text_encoder")
    write_tokenizer(tmp_path / "tokenizer")
    inner, outer, alone = map(load_embedder, (tmp_path / "text_encoder", tmp_path, model))
    assert inner.identity == outer.identity == alone.identity
    np.testing.assert_array_equal(inner("red ball"), alone("red ball"))


def test_the_identity_covers_all_that_an_embedding_depends_on(model, copied):
    identities = [
        load_embedder(model).identity,
        load_embedder(model, max_tokens=16).identity,
        load_embedder(model, dtype="bfloat16").identity,
    ]
    change_json(copied / "config.json", relative_attention_max_distance=13)
    identities.append(load_embedder(copied).identity)
    write_encoder(copied, seed=1)
    identities.append(load_embedder(copied).identity)
    write_encoder(copied)
    assert load_embedder(copied).identity == identities[0]
    (copied / "tokenizer.json").write_text((copied / "tokenizer.json").read_text().replace("▁ball", "▁bowl"))
    identities.append(load_embedder(copied).identity)
    assert len(set(identities)) == len(identities)


@pytest.mark.nightly
def test_embeddings_of_a_clip_end_with_the_pooled_one(clip):
    embed, tokenize = load_embedder(clip), PretrainedTokenizer(clip, max_tokens=12)
    loaded = load_clip_text(clip)
    tower = nnx.merge(get_graph_def(loaded.config.make), loaded.params)
    assert (embed.width, embed.max_tokens) == (16, 12)
    for text in ("red ball", "", "left abc"):
        ids = jnp.asarray(tokenize(text))[None]
        expected = tower(ids, jnp.ones_like(ids))
        result = embed(text)
        np.testing.assert_allclose(result, expected.values[0], atol=1e-5)
        np.testing.assert_allclose(result[-1], expected.pooled[0], atol=1e-5)
    with pytest.warns(UserWarning, match="is cut to 12") as caught:
        assert embed.embed_many(["red " * 30] * 2)[0].shape == (12, 16)
    assert len(caught) == 1


def test_a_clip_reads_no_more_than_it_has_positions_for(clip):
    assert load_embedder(clip, max_tokens=8).max_tokens == 8
    with pytest.raises(UserError, match=r"max_tokens=77 .* has 12 positions.* max_tokens=12"):
        load_embedder(clip, max_tokens=77)


def test_the_second_of_two_encoders_has_the_second_tokenizer(clip, tmp_path):
    save_clip(tmp_path / "text_encoder_2", tiny_clip.TEXT, load_clip_text(clip).params)
    write_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(MissingError, match=r"in .*text_encoder_2 or .*tokenizer_2\. Copy"):
        load_embedder(tmp_path / "text_encoder_2")
    tiny_clip.write_tokenizer(tmp_path / "tokenizer_2")
    assert load_embedder(tmp_path / "text_encoder_2").identity == load_embedder(clip).identity


def test_the_config_says_which_encoder_it_is(model, clip, tmp_path):
    assert read_text_encoder_config(model) == CONFIG
    assert read_text_encoder_config(clip) == tiny_clip.TEXT
    write_encoder(tmp_path)
    change_json(tmp_path / "config.json", model_type="bert")
    with pytest.raises(UserError, match=r"'bert'\. Supported text encoders are t5, umt5, clip, clip_text_model"):
        load_embedder(tmp_path)
