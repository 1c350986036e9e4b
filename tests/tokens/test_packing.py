import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_video.core.errors import UserError
from dit_video.tokens import (
    Grid,
    PackedExample,
    PackedShape,
    compute_positions,
    compute_segment_offsets,
    expand_to_tokens,
    make_empty_row,
    pack,
    segment_max,
    segment_mean,
    unpack,
)
from support.jaxprs import list_products
from support.rounded_products import MANTISSA_BITS, round_products

WIDTH = 3


def item(grid: Grid, text: int, example: int) -> PackedExample:
    draw = np.random.default_rng(example)
    return PackedExample(
        tokens=draw.normal(size=(grid.volume, WIDTH)).astype(np.float32),
        positions=compute_positions(grid),
        text=draw.integers(1, 99, text).astype(np.int32),
        example=example,
    )


ITEMS = [item(Grid(2, 2, 2), 3, 7), item(Grid(1, 2, 3), 5, 2**32 - 1)]
SHAPE = PackedShape(tokens=20, text=10, segments=3)


def test_a_row_holds_items_in_order_and_then_padding():
    row = pack(ITEMS, SHAPE, width=WIDTH)
    assert row.segments.tolist() == [1] * 8 + [2] * 6 + [0] * 6
    assert row.text_segments.tolist() == [1] * 3 + [2] * 5 + [0] * 2
    assert row.valid.tolist() == [True, True, False]
    assert row.examples[:2].tolist() == [7, 2**32 - 1]
    np.testing.assert_array_equal(row.tokens[:8], ITEMS[0].tokens)
    np.testing.assert_array_equal(row.tokens[8:14], ITEMS[1].tokens)
    np.testing.assert_array_equal(row.positions[8:14], ITEMS[1].positions)
    np.testing.assert_array_equal(row.text[3:8], ITEMS[1].text)
    assert not row.tokens[14:].any()
    assert not row.positions[14:].any()
    assert not row.text[8:].any()


def test_a_full_row_has_no_padding():
    row = pack(ITEMS, PackedShape(tokens=14, text=8, segments=2), width=WIDTH)
    assert row.segments.min() == 1
    assert row.valid.all()


def test_embeddings_lie_where_token_ids_do():
    table = np.random.default_rng(0).normal(size=(99, 5)).astype(np.float32)
    ids = pack(ITEMS, SHAPE, width=WIDTH)
    embedded = [one._replace(text=table[one.text]) for one in ITEMS]
    row = pack(embedded, SHAPE, width=WIDTH, text_width=5)
    np.testing.assert_array_equal(row.text, np.where(ids.text_segments[:, None] > 0, table[ids.text], 0))
    assert row.text.dtype == np.float32
    for name in ("tokens", "segments", "text_segments", "examples", "valid"):
        np.testing.assert_array_equal(getattr(row, name), getattr(ids, name))
    assert make_empty_row(SHAPE, width=WIDTH, text_width=5).text.shape == (10, 5)
    with pytest.raises(UserError, match=r"room for 7 text, .* 8; raise it"):
        pack(embedded, PackedShape(tokens=20, text=7, segments=3), width=WIDTH, text_width=5)


def test_an_empty_row_is_a_row_of_no_items():
    rows = pack([], SHAPE, width=WIDTH), make_empty_row(SHAPE, width=WIDTH)
    for left, right in zip(*map(jax.tree.leaves, rows), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(*[st.integers(1, 3)] * 3), max_size=4))
def test_unpack_inverts_pack(sizes):
    items = [item(Grid(*size), 1, index) for index, size in enumerate(sizes)]
    row = pack(items, PackedShape(tokens=120, text=8, segments=4), width=WIDTH)
    result = unpack(row.tokens, row.segments)
    assert len(result) == len(items)
    for tokens, packed in zip(result, items, strict=True):
        np.testing.assert_array_equal(tokens, packed.tokens)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (PackedShape(tokens=13, text=10, segments=3), r"room for 13 tokens, .* 14; raise it"),
        (PackedShape(tokens=20, text=7, segments=3), r"room for 7 text, .* 8; raise it"),
        (PackedShape(tokens=20, text=10, segments=1), r"room for 1 segments, .* 2; raise it"),
    ],
)
def test_items_that_do_not_fit_a_row_are_refused(shape, message):
    with pytest.raises(UserError, match=message):
        pack(ITEMS, shape, width=WIDTH)


def test_values_of_segments_reach_their_tokens_and_their_mean_comes_back():
    row = pack(ITEMS, SHAPE, width=WIDTH)
    segments = jnp.asarray(row.segments)[None]
    values = jnp.asarray([[[1.0, 10.0], [2.0, 20.0], [9.0, 90.0]]])
    spread = expand_to_tokens(values, segments)
    assert spread.shape == (1, 20, 2)
    np.testing.assert_array_equal(spread[0, :8], np.tile([1.0, 10.0], (8, 1)))
    np.testing.assert_array_equal(spread[0, 8:14], np.tile([2.0, 20.0], (6, 1)))
    mean = segment_mean(spread, segments, count=3)
    np.testing.assert_allclose(mean[0], [[1, 10], [2, 20], [0, 0]], rtol=1e-6)


def test_the_mean_ignores_padding_and_other_segments():
    row = pack(ITEMS, SHAPE, width=WIDTH)
    noise = np.random.default_rng(1).normal(size=(1, 20)).astype(np.float32)
    mean = jax.jit(segment_mean, static_argnames="count")(jnp.asarray(noise), jnp.asarray(row.segments)[None], count=2)
    np.testing.assert_allclose(mean[0], [noise[0, :8].mean(), noise[0, 8:14].mean()], rtol=1e-5)


SEGMENTS = jnp.asarray([[1, 1, 1, 3, 3, 0, 0], [0, 0, 1, 2, 2, 2, 2]])


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("count", [1, 3, 9])
def test_the_derivatives_of_to_tokens_are_those_of_reading_one_by_one(monkeypatch, count, platform):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    segments = jnp.minimum(jnp.asarray(SEGMENTS), count)
    draw = np.random.default_rng(0)
    values, steps = (jnp.asarray(draw.normal(size=(len(segments), count, 2, 4)), jnp.float32) for _ in range(2))
    weights = jnp.asarray(draw.normal(size=(*segments.shape, 2, 4)), jnp.float32)

    def one_by_one(values):
        return jnp.stack([row[jnp.maximum(ids - 1, 0)] for row, ids in zip(values, segments, strict=True)])

    def ours(values):
        return expand_to_tokens(values, segments)

    result, expected = (jax.vjp(f, values)[1](weights)[0] for f in (ours, one_by_one))
    np.testing.assert_allclose(result, expected, atol=1e-5)
    result, expected = (jax.jvp(f, (values,), (steps,)) for f in (ours, one_by_one))
    np.testing.assert_allclose(result, expected, atol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_to_tokens_takes_any_dtype_and_gives_padding_the_first_segments_value(monkeypatch, platform):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    for values in ([[5, 6, 7], [8, 9, 1]], [[True, False, True], [False, True, True]]):
        values = jnp.asarray(values)
        result = expand_to_tokens(values, SEGMENTS)
        assert result.dtype == values.dtype
        np.testing.assert_array_equal(result, [values[0, [0, 0, 0, 2, 2, 0, 0]], values[1, [0, 0, 0, 1, 1, 1, 1]]])


def test_segment_max_finds_the_largest_value_of_each_segment_bit_for_bit():
    values = jnp.asarray([[0.1, 0.3, 0.2, -5.0, -4.0, 9.0, 9.0], [9.0, 9.0, 1e-30, 0.7, 0.7, 0.7, 0.7]])
    result = jax.jit(segment_max, static_argnames="count")(values, SEGMENTS, count=3)
    # The maximum of an empty segment is zero, and that of negative values is negative.
    np.testing.assert_array_equal(result, np.float32([[0.3, 0.0, -4.0], [1e-30, 0.7, 0.0]]))


def test_values_of_segments_come_back_from_their_tokens_bit_for_bit():
    values = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 3)), jnp.float32)
    result = segment_max(expand_to_tokens(values, SEGMENTS), SEGMENTS, count=3)
    present = np.asarray([[True, False, True], [True, True, False]])
    np.testing.assert_array_equal(result, np.where(present, values, 0))


def test_the_mean_of_a_segment_without_tokens_is_zero_and_its_gradient_finite():
    values = jnp.ones((2, 7, 2))
    mean, pull = jax.vjp(lambda x: segment_mean(x, SEGMENTS, count=3), values)
    np.testing.assert_array_equal(mean[..., 0], [[1, 0, 1], [1, 1, 0]])
    (gradient,) = pull(jnp.ones_like(mean))
    np.testing.assert_allclose(gradient[0, :, 0], [1 / 3] * 3 + [1 / 2] * 2 + [0] * 2, rtol=1e-6)


def test_positions_count_from_zero_in_every_segment_and_run_of_padding():
    result = compute_segment_offsets(SEGMENTS)
    np.testing.assert_array_equal(result, [[0, 1, 2, 0, 1, 0, 1], [0, 1, 0, 0, 1, 2, 3]])
    row = pack(ITEMS, SHAPE, width=WIDTH)
    result = compute_segment_offsets(jnp.asarray(row.segments)[None])
    np.testing.assert_array_equal(result[0], [*range(8), *range(6), *range(6)])


@pytest.mark.parametrize("rounding", MANTISSA_BITS)
def test_means_and_their_gradients_are_exact_where_products_round_their_operands(rounding):
    values = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 3)), jnp.float32)

    def compute(values):
        mean, pull = jax.vjp(lambda values: segment_mean(values, SEGMENTS, count=3), values)
        return mean, *pull(jnp.cos(mean))

    for result, expected in zip(round_products(compute, rounding)(values), compute(values), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-6)
    text = jax.jit(compute).trace(values).lower(lowering_platforms=("tpu",)).as_text()
    products = list_products(text)
    assert len(products) == 2
    assert all("precision = [HIGHEST, HIGHEST]" in product for product in products), products
