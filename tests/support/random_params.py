"""Random parameters for tests: with a new model's zero gates and unit scales many differences would not show."""

import functools

import jax
import numpy as np

from dit_video.core.trees import map_with_path
from dit_video.nn import get_param_shapes


def make_random_params(make, seed=0):
    """Return random values, also where a new model has zeros or ones, in dictionaries that no other caller has."""
    return jax.tree.map(lambda leaf: leaf, _make_random_params(make, seed))


@functools.cache
def _make_random_params(make, seed):
    draw = np.random.default_rng(seed)

    def value(path, leaf):
        noise = draw.normal(size=leaf.shape)
        if path.endswith(("scale", "std")):
            values = 1 + 0.2 * noise
        elif path.endswith("kernel"):  # [in out], [layers in out] or [time height width in out]
            values = noise / np.sqrt(np.prod(leaf.shape[:-1]) if leaf.ndim > 3 else leaf.shape[-2])
        else:
            values = 0.5 * noise
        return jax.device_put(values.astype(np.float32))  # `jnp.asarray` would compile a program for each shape

    return map_with_path(value, get_param_shapes(make))
