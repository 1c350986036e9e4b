"""Text encoders that are trained with the denoiser."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.errors import UserError
from dit_video.core.trees import flatten
from dit_video.models.encoders import (
    ByteEncoderConfig,
    ByteTokenizer,
    WordEncoderConfig,
)
from dit_video.nn import get_graph_def, init_params
from support.random_params import make_random_params

BYTES = ByteEncoderConfig(width=16, layers=2, heads=2, max_tokens=32, patch=4)
TOKENIZE_BYTES = BYTES.make_tokenizer()


# --- tokenizer ------------------------------------------------------------------------------------------------------


TEXTS_OF_ALL_KINDS = (
    *("", "abc", "abcd", " a  b \n", "ä → 🎈", "<pad>", "a </s> b", "<unk>x", "<extra_id_0>", "\x00\x01"),
    "".join(map(chr, range(0x2000))),
)


def test_ids_are_those_of_byt5():
    from transformers.models.byt5.tokenization_byt5 import ByT5Tokenizer  # which takes seconds

    tokenize = ByT5Tokenizer(extra_ids=0, split_special_tokens=True)
    ours = ByteTokenizer(1 << 16, 1)
    for text in TEXTS_OF_ALL_KINDS:
        assert ours(text).tolist() == tokenize(text)["input_ids"]


@pytest.mark.parametrize("text", TEXTS_OF_ALL_KINDS[:-1])
def test_a_text_is_its_bytes_an_end_and_padding_to_whole_patches(text):
    expected = [byte + 3 for byte in text.encode()] + [1]
    expected += [0] * (-len(expected) % 4)
    assert TOKENIZE_BYTES(text).tolist() == expected
    assert TOKENIZE_BYTES(text).dtype == np.int32


def test_a_long_text_is_cut_and_still_ends():
    for length in (30, 31, 32, 33, 500):
        ids = TOKENIZE_BYTES("x" * length)
        assert len(ids) == 32
        assert ids[min(length, 31)] == 1
    assert len(TOKENIZE_BYTES("ä" * 40)) == 32


def test_the_empty_caption_has_a_token():
    assert len(ByteTokenizer(8, 1)("")) == 1


# --- encoder --------------------------------------------------------------------------------------------------------


GRAPH, PARAMS = get_graph_def(BYTES.make), make_random_params(BYTES.make)
TEXTS = ["a red ball", "moves left"]
LENGTH = 32
WEIGHTS = np.random.default_rng(1).normal(size=(2, 12, 16)).astype(np.float32)
"""Weights of the context tokens of each text in a loss."""


def row(*numbers: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ids, segments and weights of the context tokens of a row that holds these texts."""
    ids, segments = np.zeros(LENGTH, np.int32), np.zeros(LENGTH, np.int32)
    weights = np.zeros((LENGTH // 4, 16), np.float32)
    start = 0
    for index, number in enumerate(numbers):
        text = TOKENIZE_BYTES(TEXTS[number])
        ids[start : start + len(text)], segments[start : start + len(text)] = text, index + 1
        weights[start // 4 : (start + len(text)) // 4] = WEIGHTS[number, : len(text) // 4]
        start += len(text)
    return ids, segments, weights


@jax.jit
def run(params, ids, segments, weights):
    """Return the values of the context, its segments, and the gradients of the weighted sum."""

    def loss(params):
        context = nnx.merge(GRAPH, params)(ids, segments)
        return (context.values * weights).sum(), context

    gradients, context = jax.grad(loss, has_aux=True)(params)
    return context.values, context.segments, gradients


def rows(*members: tuple[int, ...]):
    return [jnp.asarray(np.stack(arrays)) for arrays in zip(*(row(*numbers) for numbers in members), strict=True)]


def test_packed_is_unpacked_in_values_and_gradients():
    values, segments, gradients = run(PARAMS, *rows((0, 1), ()))
    alone, alone_segments, alone_gradients = run(PARAMS, *rows((0,), (1,)))
    assert segments.tolist() == [[1] * 3 + [2] * 3 + [0] * 2, [0] * 8]
    assert alone_segments.tolist() == [[1] * 3 + [0] * 5] * 2
    assert np.std(values[0, :6]) > 0.5
    np.testing.assert_allclose(values[0, :3], alone[0, :3], atol=1e-5)
    np.testing.assert_allclose(values[0, 3:6], alone[1, :3], atol=1e-5)
    for path, gradient in flatten(gradients).items():
        assert np.abs(gradient).max() > 1e-3, path
        np.testing.assert_allclose(gradient, flatten(alone_gradients)[path], rtol=1e-4, atol=2e-5, err_msg=path)


def test_a_text_sees_neither_another_nor_padding_bit_for_bit():
    ids, segments, weights = rows((0, 1), (0,))
    values, _, _ = run(PARAMS, ids, segments, weights)
    changed, _, _ = run(PARAMS, jnp.where(segments == 1, ids, (ids + 50) % 259), segments, weights)
    np.testing.assert_array_equal(changed[:, :3], values[:, :3])
    assert (changed[0, 3:6] != values[0, 3:6]).any()


def test_every_byte_of_a_text_counts():
    ids, segments, weights = rows((0, 1), ())
    values, _, _ = run(PARAMS, ids, segments, weights)
    for position in (0, 5, 11):
        changed, _, _ = run(PARAMS, ids.at[0, position].set(200), segments, weights)
        assert np.abs(changed[0, :3] - values[0, :3]).max() > 1e-3, position


def test_order_counts():
    encode = jax.jit(lambda ids: nnx.merge(GRAPH, PARAMS)(ids, jnp.ones_like(ids)).values.mean(axis=1))
    swapped = encode(jnp.asarray([[5, 6, 7, 8, 9, 10, 11, 12], [9, 10, 11, 12, 5, 6, 7, 8]]))
    assert np.abs(swapped[0] - swapped[1]).max() > 1e-2


@pytest.mark.nightly
def test_a_fresh_encoder_tells_texts_apart():
    params = jax.jit(init_params, static_argnums=0)(BYTES.make, jax.random.key(0))
    values, _, _ = run(params, *rows((0,), (1,)))
    assert values.dtype == jnp.float32
    assert np.abs(values[0, :3] - values[1, :3]).max() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 10, "heads": 4}, "width=10, heads=4 .*heads that divide an even width"),
        ({"width": 8, "heads": 0}, "heads=0 is invalid"),
        ({"width": 9, "heads": 3}, "width=9.*even width"),
        ({"max_tokens": 30}, "max_tokens=30, patch=4 .*multiple of the patch"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"patch": 0}, "patch=0"),
    ],
)
def test_invalid_byte_encoders_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        ByteEncoderConfig(**options)


# Word encoder


WORDS = WordEncoderConfig(width=16, layers=2, heads=2, max_tokens=8)
TOKENIZE_WORDS = WORDS.make_tokenizer()


def test_a_text_is_its_words_and_an_end():
    ids = TOKENIZE_WORDS("A cat, a dog")
    assert ids.dtype == np.int32
    assert len(ids) == 6
    assert ids[0] == ids[3]
    assert ids[-1] == 1
    assert len(set(ids.tolist())) == 5
    assert ids.min() >= 1
    assert ids.max() < WORDS.buckets


def test_case_and_spaces_do_not_matter():
    np.testing.assert_array_equal(TOKENIZE_WORDS("Ein  Ball\n"), TOKENIZE_WORDS("ein ball"))


def test_ids_are_the_same_on_every_machine():
    assert TOKENIZE_WORDS("red ball").tolist() == [4005, 119, 1]


def test_the_empty_caption_has_a_token_without_words():
    assert TOKENIZE_WORDS("").tolist() == [1]


def test_a_long_text_is_cut_at_a_word_and_still_ends():
    with pytest.warns(UserWarning, match="a text of 10 tokens is cut to 8"):
        ids = TOKENIZE_WORDS("one two three four five six seven eight nine")
    assert len(ids) == 8
    assert ids[-1] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(TOKENIZE_WORDS("one two three four five six seven")) == 8


def encode(ids, segments):
    encoder = nnx.merge(get_graph_def(WORDS.make), make_random_params(WORDS.make))
    return encoder(jnp.asarray(ids)[None], jnp.asarray(segments)[None])


@pytest.mark.nightly
def test_packed_texts_are_encoded_as_alone():
    first, second = TOKENIZE_WORDS("a red ball"), TOKENIZE_WORDS("moves left")
    segments = np.repeat([1, 2, 0], [len(first), len(second), 3])
    packed = encode(np.concatenate([first, second, np.zeros(3, np.int32)]), segments)
    np.testing.assert_array_equal(packed.segments[0], segments)
    alone = [encode(ids, np.ones(len(ids), np.int32)).values[0] for ids in (first, second)]
    np.testing.assert_allclose(packed.values[0, : len(first) + len(second)], np.concatenate(alone), atol=1e-5)


def test_order_of_words_matters():
    one, other = (
        encode(TOKENIZE_WORDS(text), np.ones(4, np.int32)).values for text in ("red above blue", "blue above red")
    )
    assert np.abs(one[0, -1] - other[0, -1]).max(axis=0) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 15}, "use heads that divide an even width"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"buckets": 2}, "buckets=2 is invalid"),
    ],
)
def test_invalid_word_encoders_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        WordEncoderConfig(**options)
