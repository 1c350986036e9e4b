"""Compare the gradients of linear layers on meshes of eight devices with those of one device."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_video.distributed import AXES, MeshConfig, ShardingRules, make_mesh, make_parallelism, make_shardings
from dit_video.distributed.planner.compiled_program import override_default_backend
from dit_video.nn import Linear

SIZES = [(1, 2, 1, 4), (2, 2, 1, 2), (1, 2, 2, 2), (1, 1, 2, 4)]
LAYERS = [{}] + [{"split": s, "is_context": is_context} for s in ("outputs", "inputs") for is_context in (False, True)]
INPUTS = {"tokens": (8, 16, 24), "clips": (8, 3, 24), "grids": (8, 4, 2, 24), "shared": (1, 16, 24)}
"""Shapes of inputs: some whose tokens or rows the devices do not divide."""


def compute_gradient(layer: Linear, x, weights):
    """Return the gradient of the kernel for a weighted sum of the outputs."""

    def loss(layer):
        return (layer(x) * weights).sum()

    return nnx.grad(loss)(layer)["kernel"][...]


def check(sizes: tuple[int, ...], shape: tuple[int, ...], options: dict) -> None:
    """Compare the gradients of one layer: in float32, and in bfloat16, whose products are summed in float32."""
    mesh = make_mesh(MeshConfig(**dict(zip(AXES, sizes, strict=True))))
    draw = np.random.default_rng(0)
    x, weights = (jnp.asarray(draw.normal(size=size), jnp.float32) for size in (shape, (*shape[:-1], 16)))
    for dtype in (jnp.float32, jnp.bfloat16):
        expected = compute_gradient(Linear(24, 16, dtype=dtype, rngs=nnx.Rngs(0)), x, weights)
        layer = Linear(24, 16, dtype=dtype, parallel=make_parallelism(mesh), rngs=nnx.Rngs(0), **options)
        name = {"outputs": "up", "inputs": "down", None: "time"}[options.get("split")]
        kernel = {f"blocks/{name}/kernel": layer.kernel[...]}
        layout = make_shardings(kernel, mesh, ShardingRules(min_size=1, stacked_pattern="$^"))[f"blocks/{name}/kernel"]
        assert not layout.is_fully_replicated
        layer.kernel[...] = jax.device_put(layer.kernel[...], layout)
        actual = nnx.jit(compute_gradient, out_shardings=layout)(layer, x, weights)
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, expected, atol=1e-6 * np.abs(expected).max())


def main() -> None:
    """Check all meshes, with rows and tokens as two axes, as on accelerators."""
    with override_default_backend("tpu"):
        for sizes in SIZES:
            for shape in INPUTS.values():
                for options in LAYERS:
                    check(sizes, shape, options)
    print("done")


if __name__ == "__main__":
    main()
