import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.nn import CausalConv

KERNELS = [(3, 3, 3), (1, 3, 5), (2, 1, 1)]


def make(kernel, channels_in=3, channels_out=4, **options) -> CausalConv:
    layer = CausalConv(channels_in, channels_out, kernel, rngs=nnx.Rngs(jax.random.key(0)), **options)
    layer.bias[...] = jnp.arange(1.0, channels_out + 1)
    return layer


def video(frames=5, channels=3, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, frames, 6, 7, channels)), jnp.float32)


def three_dimensional(x, kernel, bias):
    """Apply the 3-D primitive to a clip preceded by copies of its first frame."""
    repeats = kernel.shape[0] - 1
    padded = jnp.concatenate([x[:, :1]] * repeats + [x], axis=1)
    space = [(size // 2, size // 2) for size in kernel.shape[1:3]]
    return (
        jax.lax.conv_general_dilated(
            padded, kernel, (1, 1, 1), [(0, 0), *space], dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        )
        + bias
    )


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_causal_convolution_equals_the_3d_primitive_in_values_and_gradients(kernel):
    layer, x = make(kernel), video()
    graph = nnx.graphdef(layer)
    arguments = (x, layer.kernel[...], layer.bias[...])

    def ours(x, kernel, bias):
        return nnx.merge(graph, {"kernel": kernel, "bias": bias})(x)

    @jax.jit
    def both(arguments):
        pairs = []
        for function in (ours, three_dimensional):
            value, pull = jax.vjp(function, *arguments)
            pairs.append([value, *pull(jnp.cos(value))])
        return pairs

    for left, right in zip(*both(arguments), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1)], ids=str)
def test_a_frame_sees_no_later_one(kernel):
    layer, x = make(kernel), video()
    run = jax.jit(layer)
    before, after = run(x), run(x.at[:, 3].add(1.0))
    np.testing.assert_array_equal(after[:, :3], before[:, :3])
    assert (after[:, 3] != before[:, 3]).any()
    assert (after[:, 4] != before[:, 4]).any()


def test_an_image_is_the_first_frame_and_a_still_video_is_still():
    layer, x = make((3, 3, 3)), video()
    run = jax.jit(layer)
    image = run(x[:, :1])
    np.testing.assert_allclose(run(x)[:, :1], image, atol=1e-5)
    still = run(jnp.repeat(x[:, :1], 5, axis=1))
    np.testing.assert_allclose(still, jnp.repeat(image, 5, axis=1), atol=1e-5)


def test_convolutions_have_float32_kernels_and_compute_in_their_dtype():
    layer = make((3, 3, 3), dtype=jnp.dtype("bfloat16"))
    assert layer.kernel[...].shape == (3, 3, 3, 3, 4)
    assert layer.kernel[...].dtype == jnp.float32
    assert jax.eval_shape(layer, video()).dtype == jnp.bfloat16
    assert 0.9 * np.sqrt(6 / (27 * 7)) <= jnp.abs(layer.kernel[...]).max() <= np.sqrt(6 / (27 * 7))
    assert not make((1, 1, 1), init="zero").kernel[...].any()


@pytest.mark.parametrize("form", ["offsets", "stacked", "native", "columns", "auto"])
def test_products_in_bfloat16_are_summed_in_float32_and_rounded_once(form):
    layer = CausalConv(64, 16, (3, 3, 3), form=form, dtype=jnp.dtype("bfloat16"), rngs=nnx.Rngs(0))
    x = video(frames=3, channels=64).astype(jnp.bfloat16)
    rounded = CausalConv(64, 16, (3, 3, 3), form=form, rngs=nnx.Rngs(0))
    rounded.kernel[...] = layer.kernel[...].astype(jnp.bfloat16).astype(jnp.float32)
    expected = jax.jit(rounded)(x.astype(jnp.float32)).astype(jnp.bfloat16)
    assert (jax.jit(layer)(x) != expected).mean() < 0.01  # sums in bfloat16 differ in a half
