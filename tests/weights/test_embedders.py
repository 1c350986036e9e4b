import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.errors import MissingError, UserError
from dit_video.models.encoders import PretrainedTokenizer
from dit_video.nn import get_graph_def
from dit_video.weights import load_clip_text, load_embedder, read_text_encoder_config, save_clip
from support import tiny_clip
from support.tiny_t5 import CONFIG, change_json, write_encoder, write_tokenizer


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


def test_a_folder_without_an_encoder_is_refused(tmp_path):
    write_tokenizer(tmp_path)
    with pytest.raises(MissingError, match=r"no such file: .*config.json"):
        load_embedder(tmp_path)


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
