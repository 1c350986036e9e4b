import jax
import jax.numpy as jnp
import numpy as np

from dit_video.models.conditioning import drop_captions
from dit_video.models.encoders import ByteTokenizer

TOKENIZE = ByteTokenizer(32, 4)
EMPTY = TOKENIZE("")
DROP = jax.jit(drop_captions)
CAPTIONS = ["a red ball", "", "a blue box moves"]


def row(captions, length=48):
    text, segments = np.zeros(length, np.int32), np.zeros(length, np.int32)
    start = 0
    for index, caption in enumerate(captions):
        ids = TOKENIZE(caption)
        text[start : start + len(ids)], segments[start : start + len(ids)] = ids, index + 1
        start += len(ids)
    return jnp.asarray(text)[None], jnp.asarray(segments)[None]


def by_segment(text, segments):
    return [np.asarray(text[0])[np.asarray(segments[0]) == index + 1].tolist() for index in range(3)]


def test_a_dropped_caption_is_the_tokenised_empty_one():
    text, segments = row(CAPTIONS)
    for drop in ([True, False, False], [False, True, True], [True] * 3, [False] * 3):
        result = by_segment(*DROP(text, segments, jnp.asarray([drop]), empty=EMPTY))
        expected = [CAPTIONS[index] if not dropped else "" for index, dropped in enumerate(drop)]
        assert result == [TOKENIZE(caption).tolist() for caption in expected]


def test_the_rest_of_a_dropped_caption_is_padding():
    text, segments = row(CAPTIONS)
    found_text, found_segments = DROP(text, segments, jnp.asarray([[True, False, True]]), empty=EMPTY)
    assert found_segments[0].tolist() == [1] * 4 + [0] * 8 + [2] * 4 + [3] * 4 + [0] * 28
    assert not found_text[found_segments == 0].any()
    assert (found_text.dtype, found_segments.dtype) == (text.dtype, segments.dtype)


def test_a_dropout_of_zero_changes_nothing():
    text, segments = row(CAPTIONS)
    for left, right in zip(DROP(text, segments, jnp.zeros((1, 3), bool), empty=EMPTY), (text, segments), strict=True):
        np.testing.assert_array_equal(left, right)


def test_captions_of_rows_are_dropped_independently():
    text, segments = (jnp.concatenate([array, array]) for array in row(CAPTIONS))
    drop = jnp.asarray([[True, False, False], [False, False, True]])
    found_text, found_segments = DROP(text, segments, drop, empty=EMPTY)
    for index in range(2):
        alone = DROP(text[:1], segments[:1], drop[index][None], empty=EMPTY)
        np.testing.assert_array_equal(found_text[index], alone[0][0])
        np.testing.assert_array_equal(found_segments[index], alone[1][0])


def test_an_empty_caption_may_have_several_tokens():
    text, segments = jnp.arange(10, 22)[None], jnp.asarray([[1] * 6 + [2] * 6])
    result = DROP(text, segments, jnp.asarray([[False, True]]), empty=jnp.asarray([7, 8, 9]))
    assert result[0][0].tolist() == [*range(10, 16), 7, 8, 9, 0, 0, 0]
    assert result[1][0].tolist() == [1] * 6 + [2] * 3 + [0] * 3


def test_embeddings_are_dropped_as_token_ids_are():
    table = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)
    text, segments = row(CAPTIONS)
    embedded = jnp.where(segments[..., None] > 0, table[text], 0)
    for drop in ([True, False, True], [False, True, False]):
        ids, expected = DROP(text, segments, jnp.asarray([drop]), empty=EMPTY)
        result, found_segments = DROP(embedded, segments, jnp.asarray([drop]), empty=table[EMPTY])
        np.testing.assert_array_equal(found_segments, expected)
        np.testing.assert_array_equal(result, np.where(expected[..., None] > 0, table[ids], 0))
        assert result.dtype == np.float32
