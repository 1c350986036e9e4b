"""Parameters that hide nothing: a fresh model's zero gates and unit scales would let much pass as equal."""

import jax.numpy as jnp
import numpy as np

from dit_video.nn import param_shapes
from dit_video.tree import map_with_path


def rough_params(make, seed=0):
    """Random wherever a fresh model is zero or one."""
    draw = np.random.default_rng(seed)

    def value(path, leaf):
        noise = jnp.asarray(draw.normal(size=leaf.shape), jnp.float32)
        if path.endswith(("scale", "std")):
            return 1 + 0.2 * noise
        if path.endswith("kernel"):  # [in out], [layers in out] or [time height width in out]
            inputs = np.prod(leaf.shape[:-1]) if leaf.ndim > 3 else leaf.shape[-2]
            return noise / np.sqrt(inputs)
        return 0.5 * noise

    return map_with_path(value, param_shapes(make))
