"""Layers equal those of torch in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.nn import AttentionInputs, CausalConv, make_attention

pytestmark = pytest.mark.parity


def arrays(*shapes):
    generator = np.random.default_rng(0)
    return [generator.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("backend", ["dense", "chunked"])
def test_attention_equals_torch(backend):
    torch = pytest.importorskip("torch")
    q, k, v, weight = arrays((2, 24, 3, 8), (2, 16, 3, 8), (2, 16, 3, 8), (2, 24, 3, 8))
    q_segments = np.repeat([[1, 2, 3]], 8, axis=1).repeat(2, axis=0).astype(np.int32)
    kv_segments = np.sort(np.repeat([[1, 2, 3, 3]], 4, axis=1), axis=1).repeat(2, axis=0).astype(np.int32)
    attention = make_attention(backend, chunk=10)
    inputs = AttentionInputs(jnp.asarray(q_segments), jnp.asarray(kv_segments))

    def loss(q, k, v):
        return (attention(q, k, v, inputs) * weight).sum()

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1, 2))(*map(jnp.asarray, (q, k, v)))
    tensors = [torch.from_numpy(array).requires_grad_() for array in (q, k, v)]
    mask = torch.from_numpy(q_segments[:, None, :, None] == kv_segments[:, None, None, :])
    mixed = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in tensors), attn_mask=mask)
    expected = (mixed.transpose(1, 2) * torch.from_numpy(weight)).sum()
    expected.backward()
    np.testing.assert_allclose(float(value), float(expected.detach()), rtol=1e-5, atol=1e-4)
    for ours, tensor in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(np.asarray(ours), tensor.grad.numpy(), atol=1e-5)


def test_causal_convolution_equals_torch():
    torch = pytest.importorskip("torch")
    x, weight = arrays((2, 5, 6, 7, 3), (2, 5, 6, 7, 4))
    conv = CausalConv(3, 4, (3, 3, 3), rngs=nnx.Rngs(jax.random.key(0)))
    graph, params = nnx.split(conv)

    def loss(x, params):
        return (nnx.merge(graph, params)(x) * weight).sum()

    value, (to_x, to_params) = jax.value_and_grad(loss, argnums=(0, 1))(jnp.asarray(x), params)
    tensor = torch.from_numpy(x).requires_grad_()
    kernel = torch.from_numpy(np.asarray(conv.kernel[...]).transpose(4, 3, 0, 1, 2).copy()).requires_grad_()
    bias = torch.from_numpy(np.array(conv.bias[...])).requires_grad_()
    channels_first = tensor.permute(0, 4, 1, 2, 3)
    padded = torch.cat([channels_first[:, :, :1].repeat(1, 1, 2, 1, 1), channels_first], dim=2)
    convolved = torch.nn.functional.conv3d(padded, kernel, bias, padding=(0, 1, 1))
    expected = (convolved.permute(0, 2, 3, 4, 1) * torch.from_numpy(weight)).sum()
    expected.backward()
    np.testing.assert_allclose(float(value), float(expected.detach()), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.asarray(to_x), tensor.grad.numpy(), atol=1e-4)
    ours = nnx.to_pure_dict(to_params)
    np.testing.assert_allclose(np.asarray(ours["kernel"]), kernel.grad.numpy().transpose(2, 3, 4, 1, 0), atol=1e-3)
    np.testing.assert_allclose(np.asarray(ours["bias"]), bias.grad.numpy(), atol=1e-3)
