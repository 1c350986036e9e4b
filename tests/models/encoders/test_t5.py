import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.core.trees import flatten
from dit_video.models.encoders import T5Config
from dit_video.models.encoders.t5 import compute_relative_buckets
from dit_video.nn import get_graph_def
from support.random_params import make_random_params

UMT5 = T5Config(vocabulary=40, width=16, layers=3, heads=3, head_width=4, mlp_width=24, buckets=8, max_distance=12)
T5 = dataclasses.replace(UMT5, activation="relu", position_bias="shared", layers=2)
LENGTHS = (17, 5, 9)
"""Lengths of three texts; the first is longer than the largest distance."""
IDS = [np.random.default_rng(index).integers(3, 40, length).astype(np.int32) for index, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module", params=[UMT5, T5], ids=["umt5", "t5"])
def encode(request):
    """Return a function that gives the values of rows of texts and the gradient of their weighted sum."""
    graph, params = get_graph_def(request.param.make), make_random_params(request.param.make)

    @jax.jit
    def run(ids, segments, weights):
        def loss(params):
            values = nnx.merge(graph, params)(ids, segments).values
            return (values * weights).sum(), values

        gradients, values = jax.grad(loss, has_aux=True)(params)
        return values, gradients

    return run


def rows(*members: tuple[int, ...], length: int = 34):
    """Return ids, segments and weights of tokens in a loss, which are the same for a text in any place."""
    ids = np.random.default_rng(9).integers(0, 40, (len(members), length)).astype(np.int32)  # padding is arbitrary
    segments, weights = np.zeros_like(ids), np.zeros((*ids.shape, 16), np.float32)
    for row, numbers in enumerate(members):
        start = 0
        for index, number in enumerate(numbers):
            here = slice(start, start + LENGTHS[number])
            ids[row, here], segments[row, here] = IDS[number], index + 1
            weights[row, here] = np.random.default_rng(number).normal(size=(LENGTHS[number], 16))
            start = here.stop
    return jnp.asarray(ids), jnp.asarray(segments), jnp.asarray(weights)


def test_packed_is_one_by_one_in_values_and_gradients(encode):
    values, gradients = encode(*rows((1, 0, 2), (), ()))
    alone, alone_gradients = encode(*rows((0,), (1,), (2,)))
    assert np.std(values[0, :31]) > 0.3
    np.testing.assert_allclose(values[0, :5], alone[1, :5], atol=1e-5)
    np.testing.assert_allclose(values[0, 5:22], alone[0, :17], atol=1e-5)
    np.testing.assert_allclose(values[0, 22:31], alone[2, :9], atol=1e-5)
    for path, gradient in flatten(gradients).items():
        assert np.abs(gradient).max() > 1e-3, path
        np.testing.assert_allclose(gradient, flatten(alone_gradients)[path], rtol=1e-4, atol=2e-5, err_msg=path)


def test_a_text_sees_neither_another_nor_padding_bit_for_bit(encode):
    ids, segments, weights = rows((1, 0), (2,), ())
    values, _ = encode(ids, segments, weights)
    changed, _ = encode(jnp.where(segments == 1, ids, (ids + 7) % 40), segments, weights)
    np.testing.assert_array_equal(changed[0, :5], values[0, :5])
    np.testing.assert_array_equal(changed[1, :9], values[1, :9])
    assert (changed[0, 5:22] != values[0, 5:22]).any()
    assert np.isfinite(values).all()


def test_every_token_of_a_text_counts_and_so_does_its_place(encode):
    ids, segments, weights = rows((0,), (), ())
    values, _ = encode(ids, segments, weights)
    for position in (0, 8, 16):
        changed, _ = encode(ids.at[0, position].set(39 - ids[0, position]), segments, weights)
        assert np.abs(changed[0, :17] - values[0, :17]).max(axis=1).min() > 1e-5, position
    swapped, _ = encode(ids.at[0, 3].set(ids[0, 4]).at[0, 4].set(ids[0, 3]), segments, weights)
    assert np.abs(swapped[0, 0] - values[0, 0]).max() > 1e-4


def test_bfloat16_is_close():
    graph = get_graph_def(UMT5.make)
    half = get_graph_def(dataclasses.replace(UMT5, dtype="bfloat16").make)
    params, (ids, segments, _) = make_random_params(UMT5.make), rows((0, 1))
    exact = nnx.merge(graph, params)(ids, segments).values
    rounded = nnx.merge(half, params)(ids, segments).values
    assert rounded.dtype == jnp.float32
    error = np.abs(rounded - exact)[0, :22]
    assert 1e-4 < error.max() < 0.15
    assert error.mean() < 0.02


def test_relative_buckets_are_those_of_the_t5_paper():
    """The expected values, 32 buckets up to distance 128, are those of the original code."""
    row = compute_relative_buckets(300, buckets=32, max_distance=128)[0]  # the first query looks ahead
    assert row[:9].tolist() == [0, 17, 18, 19, 20, 21, 22, 23, 24]
    first = {bucket: int(np.argmax(row == bucket)) for bucket in range(24, 32)}
    # 8 * 16 ** (i / 8): 8, 11.3, 16, 22.6, 32, 45.3, 64, 90.5
    assert first == {24: 8, 25: 12, 26: 16, 27: 23, 28: 32, 29: 46, 30: 64, 31: 91}
    back = compute_relative_buckets(300, buckets=32, max_distance=128)[:, 0]
    np.testing.assert_array_equal(back[1:], row[1:] - 16)


def test_a_bucket_depends_on_the_distance_alone():
    table = compute_relative_buckets(20, buckets=8, max_distance=12)
    np.testing.assert_array_equal(table[1:, 1:], table[:-1, :-1])
    assert set(table.ravel().tolist()) == {0, 1, 2, 3, 5, 6, 7}  # 4 would be distance 0 ahead


def test_configs_go_to_json_and_back():
    for config in (UMT5, T5):
        assert config_json.from_json(config_json.to_json(config)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 0}, "heads=0 is invalid: it must be at least 1"),
        ({"buckets": 7}, "buckets=7.*even number"),
        ({"buckets": 2}, "buckets=2.*at least 4"),
        ({"max_distance": 2}, "max_distance=2.*above a quarter"),
        ({"dtype": "float16"}, "dtype='float16' .*float32 or bfloat16"),
    ],
)
def test_invalid_t5_configs_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(UMT5, **change)
