import dataclasses
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.errors import UserError
from dit_video.models.encoders import Embedder, PretrainedTokenizer
from dit_video.models.encoders.embedder import FolderCache, MemoryCache
from dit_video.nn import get_graph_def
from support.random_params import make_random_params
from support.tiny_t5 import CONFIG, write_tokenizer

PARAMS = make_random_params(CONFIG.make)
TEXTS = ["a red ball moves left", "", "green cube", "red " * 40, "a red ball moves left", "xyz"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return PretrainedTokenizer(folder, max_tokens=48)


@pytest.fixture(scope="module")
def make(tokenizer):
    def make(identity="one", params=PARAMS, **options):
        return Embedder(CONFIG, params, tokenizer, identity=identity, **options)

    return make


@pytest.fixture(scope="module")
def embed(make):
    return make()


@pytest.fixture
def counted(make, monkeypatch):
    """Return a function that makes an embedder and the list of the shapes of its batches."""

    def counted(**options):
        embedder, shapes = make(**options), []
        encode = embedder._encode
        monkeypatch.setattr(embedder, "_encode", lambda p, ids, s: shapes.append(ids.shape) or encode(p, ids, s))
        return embedder, shapes

    return counted


def test_a_text_has_the_vectors_of_the_encoder_alone(embed, tokenizer):
    graph = get_graph_def(CONFIG.make)
    encoder = jax.jit(lambda ids: nnx.merge(graph, PARAMS)(ids, jnp.ones_like(ids)).values[0])
    for text in TEXTS[:3]:
        ids = jnp.asarray(tokenizer(text))[None]
        values = embed(text)
        assert values.dtype == np.float32
        assert values.shape == (ids.shape[1], embed.width)
        np.testing.assert_allclose(values, encoder(ids), atol=1e-5)
    assert np.std(embed(TEXTS[0])) > 0.3
    assert (embed.identity, embed.width, embed.max_tokens) == ("one", 16, 48)


def test_embedding_many_texts_equals_one_by_one_in_order(make):
    one, many = make(), make()
    texts = TEXTS + [f"a {letter} cube" for letter in "bcdefghijklmn"]
    result = many.embed_many(texts)
    assert len(result) == len(texts)
    for text, value in zip(texts, result, strict=True):
        np.testing.assert_allclose(value, one(text), atol=1e-5)
    assert many.embed_many([]) == []


def test_batches_are_of_a_few_shapes(counted):
    embedder, shapes = counted()
    short, long = [f"{a} {b}" for a in "abcdef" for b in "abc"], ["red " * n for n in range(32, 42)]
    embedder.embed_many(short + long)
    assert sorted(shapes) == sorted([(8, 32)] * 2 + [(1, 32)] * 2 + [(8, 48)] + [(1, 48)] * 2)  # at most max_tokens


def test_a_text_is_computed_once(counted):
    embedder, shapes = counted()
    first = embedder("red ball")
    assert embedder.embed_many(["red ball", "red ball"])[1] is first
    embedder.embed_many(["green cube", "green cube"])
    assert len(shapes) == 2
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 0


def test_a_long_text_is_cut_with_one_warning(embed):
    with pytest.warns(UserWarning, match="a text of 61 tokens is cut to 48: 'red red") as caught:
        values = embed.embed_many(["red " * 60] * 2)
    assert [value.shape for value in values] == [(48, 16)] * 2
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embed("red " * 60)


def test_memory_is_bounded(counted):
    embedder, shapes = counted(memory_bytes=2 * 3 * 16 * 4)  # two texts of three tokens
    for text in ("red ball", "red cube", "red ball", "green ball", "red ball", "red cube"):
        embedder(text)
    assert len(shapes) == 4  # the cube was the least recently used


def test_another_embedder_reads_the_embeddings_on_disk(counted, tmp_path):
    first, shapes = counted(cache=tmp_path)
    expected = first.embed_many(TEXTS)
    again, none = counted(cache=tmp_path)
    for value, same in zip(expected, again.embed_many(TEXTS), strict=True):
        np.testing.assert_array_equal(value, same)
    assert len(shapes) > 0
    assert none == []
    assert len(list(tmp_path.rglob("*"))) == 1 + 2 * len(set(TEXTS))  # and no leftovers


def test_encoders_do_not_mix_on_disk(counted, tmp_path):
    first, _ = counted(cache=tmp_path)
    other, shapes = counted(cache=tmp_path, identity="two", params=make_random_params(CONFIG.make, seed=1))
    assert np.abs(first("red ball") - other("red ball")).max() > 0.1
    assert len(shapes) == 1


@pytest.mark.parametrize("damage", ["cut off", "empty", "another width", "pickle"])
def test_a_damaged_file_is_written_anew(counted, tmp_path, damage):
    first, _ = counted(cache=tmp_path)
    expected = first("red ball")
    path = FolderCache(tmp_path, identity="one", width=16).get_path("red ball")
    match damage:
        case "cut off":
            path.write_bytes(path.read_bytes()[:-5])
        case "empty":
            path.write_bytes(b"")
        case "another width":
            np.save(path, np.zeros((3, 8), np.float32))
        case "pickle":
            np.save(path, np.asarray([{"a": 1}], object), allow_pickle=True)
    again, shapes = counted(cache=tmp_path)
    with pytest.warns(UserWarning, match="embedded again"):
        np.testing.assert_allclose(again("red ball"), expected, atol=1e-6)
    assert len(shapes) == 1
    np.testing.assert_allclose(np.load(path), expected, atol=1e-6)


def test_a_cache_that_cannot_be_written_is_reported(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        make(cache=tmp_path / "file")("red ball")


def test_a_tokenizer_of_another_encoder_is_refused(tokenizer):

    small = dataclasses.replace(CONFIG, vocabulary=10)
    with pytest.raises(UserError, match=r"ids reach \d+, but the encoder has 10 embeddings"):
        Embedder(small, make_random_params(small.make), tokenizer, identity="x")


# Cache


def test_the_memory_cache_keeps_the_latest_used_texts():
    values = {name: np.full((1, 2), index, np.float32) for index, name in enumerate("abc")}
    memory = MemoryCache(16)
    memory.put("a", values["a"])
    memory.put("b", values["b"])
    assert memory.get("a") is values["a"]
    memory.put("c", values["c"])
    assert memory.get("b") is None
    memory.put("a", values["b"])  # a replacement does not count twice
    assert memory.get("a") is values["b"]
    assert memory.get("c") is values["c"]
    memory.put("big", np.zeros((9, 9), np.float32))
    assert memory.get("big") is None
    assert memory.get("c") is values["c"]


def test_the_memory_counts_right_when_threads_share_it():
    memory = MemoryCache(10 * 8)

    def use(seed):
        for number in np.random.default_rng(seed).integers(0, 40, 2000):
            memory.put(str(number), np.full((1, 2), number, np.float32))
            value = memory.get(str(number))
            assert value is None or value[0, 0] == number

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(memory.get(str(number)) is not None for number in range(40)) == 10


@pytest.mark.parametrize("text", ["", "red ball", "ä/../🎈\n", "x" * 5000])
def test_any_text_can_be_cached_in_a_file(tmp_path, text):
    cache = FolderCache(tmp_path, identity="one", width=3)
    value = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    assert cache.get(text) is None
    cache.put(text, value)
    np.testing.assert_array_equal(cache.get(text), value)
    assert cache.get_path(text).parent.parent == tmp_path / "one"
    assert FolderCache(tmp_path, identity="two", width=3).get(text) is None
