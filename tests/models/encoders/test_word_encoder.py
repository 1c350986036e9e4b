import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.errors import UserError
from dit_video.models.encoders import TextEncoder, TextEncoderConfig, WordEncoder, WordEncoderConfig
from dit_video.nn import get_graph_def
from support.random_params import make_random_params

CONFIG = WordEncoderConfig(width=16, layers=2, heads=2, max_tokens=8)
TOKENIZE = CONFIG.make_tokenizer()


def test_a_text_is_its_words_and_an_end():
    ids = TOKENIZE("A cat, a dog")
    assert ids.dtype == np.int32
    assert len(ids) == 6
    assert ids[0] == ids[3]
    assert ids[-1] == 1
    assert len(set(ids.tolist())) == 5
    assert ids.min() >= 1
    assert ids.max() < CONFIG.buckets


def test_case_and_spaces_do_not_matter():
    np.testing.assert_array_equal(TOKENIZE("Ein  Ball\n"), TOKENIZE("ein ball"))


def test_ids_are_the_same_on_every_machine():
    assert TOKENIZE("red ball").tolist() == [4005, 119, 1]


def test_the_empty_caption_has_a_token():
    assert TOKENIZE("").tolist() == [1]


def test_a_long_text_is_cut_and_still_ends():
    with pytest.warns(UserWarning, match="a text of 10 tokens is cut to 8"):
        ids = TOKENIZE("one two three four five six seven eight nine")
    assert len(ids) == 8
    assert ids[-1] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(TOKENIZE("one two three four five six seven")) == 8


def encode(ids, segments):
    encoder = nnx.merge(get_graph_def(CONFIG.make), make_random_params(CONFIG.make))
    return encoder(jnp.asarray(ids)[None], jnp.asarray(segments)[None])


def test_packed_texts_are_encoded_as_alone():
    first, second = TOKENIZE("a red ball"), TOKENIZE("moves left")
    segments = np.repeat([1, 2, 0], [len(first), len(second), 3])
    packed = encode(np.concatenate([first, second, np.zeros(3, np.int32)]), segments)
    np.testing.assert_array_equal(packed.segments[0], segments)
    alone = [encode(ids, np.ones(len(ids), np.int32)).values[0] for ids in (first, second)]
    np.testing.assert_allclose(packed.values[0, : len(first) + len(second)], np.concatenate(alone), atol=1e-5)


def test_order_of_words_matters():
    one, other = (encode(TOKENIZE(text), np.ones(4, np.int32)).values for text in ("red above blue", "blue above red"))
    assert np.abs(one[0, -1] - other[0, -1]).max(axis=0) > 1e-3


def test_the_word_encoder_has_the_interface_of_text_encoders():
    assert isinstance(CONFIG, TextEncoderConfig)
    assert issubclass(WordEncoder, TextEncoder)


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
