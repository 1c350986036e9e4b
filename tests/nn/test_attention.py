import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.errors import UserError
from dit_video.nn import make_attention
from dit_video.nn.attention import Auto, Chunked, dense

SEGMENTS = jnp.asarray([[1] * 4 + [2] * 5 + [3] * 2 + [0] * 2, [1] * 11 + [0] * 2])
"""13 tokens a row, 2 of them padding"""
CONTEXT_SEGMENTS = jnp.asarray([[1] * 2 + [2] * 1 + [3] * 3 + [0], [1] * 7])
REAL = SEGMENTS > 0


def inputs(keys: int = SEGMENTS.shape[1], heads: int = 2, width: int = 4, seed: int = 0):
    draw = np.random.default_rng(seed)
    shapes = [(2, SEGMENTS.shape[1], heads, width), (2, keys, heads, width), (2, keys, heads, width)]
    return [jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in shapes]


def reference(q, k, v, *, q_segments, kv_segments):
    return jax.nn.dot_product_attention(q, k, v, mask=(q_segments[:, :, None] == kv_segments[:, None])[:, None])


def value_and_gradients(attention, arrays, kv_segments):
    """Of the real queries; what padding attends to is nobody's business."""
    weights = jnp.asarray(np.random.default_rng(9).normal(size=arrays[0].shape), jnp.float32)

    @jax.jit
    def run(arrays):
        def loss(arrays):
            out = attention(*arrays, q_segments=SEGMENTS, kv_segments=kv_segments)
            return (jnp.where(REAL[..., None, None], out, 0) * weights).sum(), jnp.where(REAL[..., None, None], out, 0)

        return jax.grad(loss, has_aux=True)(arrays)

    gradients, value = run(arrays)
    return [value, *gradients]


@pytest.mark.parametrize(
    ("kv_segments", "backends"),
    [
        (SEGMENTS, [dense, Chunked(5), Chunked(1), Chunked(32)]),
        (CONTEXT_SEGMENTS, [dense, Chunked(5)]),
    ],
    ids=["self", "cross"],
)
def test_every_backend_equals_the_masked_reference_in_values_and_gradients(kv_segments, backends):
    arrays = inputs(kv_segments.shape[1])
    expected = value_and_gradients(reference, arrays, kv_segments)
    for attention in backends:
        for left, right in zip(value_and_gradients(attention, arrays, kv_segments), expected, strict=True):
            np.testing.assert_allclose(left, right, atol=2e-6, err_msg=str(attention))


def test_auto_is_dense_for_short_rows_and_chunked_for_long_ones():
    def program(attention):
        ids = {"q_segments": SEGMENTS, "kv_segments": SEGMENTS}
        return str(jax.make_jaxpr(lambda *arrays: attention(*arrays, **ids))(*inputs()))

    assert program(Auto(13, Chunked(5))) == program(dense)
    assert program(Auto(12, Chunked(5))) == program(Chunked(5)) != program(dense)


def test_the_branch_for_accelerators_equals_the_one_for_cpu(monkeypatch):
    arrays = inputs()
    expected = value_and_gradients(dense, arrays, SEGMENTS)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for left, right in zip(value_and_gradients(dense, arrays, SEGMENTS), expected, strict=True):
        np.testing.assert_allclose(left, right, atol=2e-6)


@pytest.mark.parametrize("attention", [dense, Chunked(5)], ids=["dense", "chunked"])
def test_a_segment_sees_no_other_bit_for_bit(attention):
    q, k, v = inputs()
    run = jax.jit(lambda q, k, v: attention(q, k, v, q_segments=SEGMENTS, kv_segments=SEGMENTS))
    changed = [jnp.where((SEGMENTS != 2)[..., None, None], 7.0 * x + 3.0, x) for x in (q, k, v)]
    before, after = run(q, k, v), run(*changed)
    np.testing.assert_array_equal(after[0, 4:9], before[0, 4:9])
    assert (after[1, :11] != before[1, :11]).all()


def test_a_known_answer():
    q = jnp.zeros((1, 3, 1, 4))
    v = jnp.arange(12.0).reshape(1, 3, 1, 4)
    segments = jnp.asarray([[1, 1, 2]])
    out = dense(q, v, v, q_segments=segments, kv_segments=segments)
    np.testing.assert_allclose(out[0, :, 0], [[2, 3, 4, 5], [2, 3, 4, 5], [8, 9, 10, 11]], rtol=1e-6)


def test_a_query_without_keys_and_large_scores_stay_finite():
    q, k, v = inputs()
    ids = {"q_segments": SEGMENTS, "kv_segments": jnp.ones_like(SEGMENTS)}
    run = jax.jit(jax.value_and_grad(lambda q: dense(q, 1e3 * k, v, **ids).sum()))
    out, gradient = run(1e3 * q)
    assert np.isfinite(out)
    assert np.isfinite(gradient).all()


def test_bfloat16_has_a_float32_softmax():
    arrays = [x.astype(jnp.bfloat16) for x in inputs()]
    run = jax.jit(lambda *arrays: dense(*arrays, q_segments=SEGMENTS, kv_segments=SEGMENTS))
    out = run(*arrays)
    assert out.dtype == jnp.bfloat16
    exact = run(*(x.astype(jnp.float32) for x in arrays))
    assert np.abs(np.asarray(out, np.float32) - exact).max() < 0.03


def test_chunked_memory_is_linear_in_the_row_and_dense_memory_is_not():
    def temporary_bytes(attention, length):
        array = jax.ShapeDtypeStruct((1, length, 1, 4), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        gradient = jax.grad(lambda q, k, v, ids: attention(q, k, v, q_segments=ids, kv_segments=ids).sum(), (0, 1, 2))
        return jax.jit(gradient).lower(array, array, array, ids).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(dense, 2048) > 3.5 * temporary_bytes(dense, 1024)
    assert temporary_bytes(Chunked(64), 2048) < 2.5 * temporary_bytes(Chunked(64), 1024)
    assert temporary_bytes(Chunked(64), 2048) < temporary_bytes(dense, 2048) / 8


def test_backends_by_name():
    assert make_attention("dense") is dense
    assert make_attention("chunked", chunk=64) == Chunked(64)
    assert make_attention("auto", chunk=64) == Auto(128, Chunked(64))
    assert make_attention() == make_attention("auto")
    # Equal models have equal graphs, so that a program is compiled once: an attention is a value.
    assert hash(make_attention()) == hash(make_attention())


@pytest.mark.parametrize("backend", ["flash", ""])
def test_an_unknown_backend(backend):
    with pytest.raises(UserError, match="use auto, dense or chunked"):
        inspect.unwrap(make_attention)(backend)
