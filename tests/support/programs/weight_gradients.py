"""Compare the gradients of linear layers on meshes of eight devices with those of one device."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from dit_video.distributed import AXES, Parallelism, ShardingRules, make_partitioner, make_shardings
from dit_video.nn import Linear
from dit_video.planning.compiled_program import override_default_backend

SIZES = [(1, 2, 1, 4), (2, 2, 1, 2), (1, 2, 2, 2), (1, 1, 2, 4)]
LAYERS = [{}] + [{"split": s, "is_context": is_context} for s in ("outputs", "inputs") for is_context in (False, True)]
INPUTS = {"tokens": (8, 16, 24), "clips": (8, 3, 24), "grids": (8, 4, 2, 24), "shared": (1, 16, 24)}
"""Shapes of inputs: some whose tokens or rows the devices do not divide."""
RULES = ShardingRules(min_size=1, stacked_pattern="$^")


def compute_gradient(layer: Linear, x, weights):
    """Return the gradient of the kernel for a weighted sum of the outputs."""

    def loss(layer):
        return (layer(x) * weights).sum()

    return nnx.grad(loss)(layer)["kernel"][...]


@functools.cache
def make_case(shape: tuple[int, ...], dtype: DTypeLike) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """Return inputs, weights of the outputs, and the gradient on one device."""
    draw = np.random.default_rng(0)
    x, weights = (jnp.asarray(draw.normal(size=size), jnp.float32) for size in (shape, (*shape[:-1], 16)))
    layer = Linear(24, 16, dtype=dtype, rngs=nnx.Rngs(0))
    return x, weights, np.asarray(nnx.jit(compute_gradient)(layer, x, weights))


def check(sizes: tuple[int, ...], shape: tuple[int, ...], options: dict, dtype: DTypeLike) -> None:
    """Compare the gradient of one layer; that of bfloat16's products is summed in float32, too."""
    partitioner = make_partitioner(Parallelism(**dict(zip(AXES, sizes, strict=True))))
    x, weights, expected = make_case(shape, dtype)
    layer = Linear(24, 16, dtype=dtype, partitioner=partitioner, rngs=nnx.Rngs(0), **options)
    name = {"outputs": "up", "inputs": "down", None: "time"}[options.get("split")]
    kernel = {f"blocks/{name}/kernel": layer.kernel[...]}
    layout = make_shardings(kernel, partitioner.mesh, RULES)[f"blocks/{name}/kernel"]
    assert not layout.is_fully_replicated
    layer.kernel[...] = jax.device_put(layer.kernel[...], layout)
    actual = nnx.jit(compute_gradient, out_shardings=layout)(layer, x, weights)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, atol=1e-6 * np.abs(expected).max())


def main() -> None:
    """Check all meshes, with rows and tokens as two axes, as on accelerators; the cases have the dtypes in turn."""
    cases = itertools.product(SIZES, INPUTS.values(), LAYERS)
    with override_default_backend("tpu"):
        for (sizes, shape, options), dtype in zip(cases, itertools.cycle((jnp.float32, jnp.bfloat16)), strict=False):
            check(sizes, shape, options, dtype)
    print("done")


if __name__ == "__main__":
    main()
