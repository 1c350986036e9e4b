"""Weights of 8 bits with a scale for each output (LLM.int8, arXiv 2208.07339), as a file of another package."""

import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_video.core.registry import register
from dit_video.core.trees import map_with_path
from dit_video.nn import Kernel


@register
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Kernel(Kernel):
    """The kernel `values * scale`."""

    values: Any
    """Whole numbers from -127 to 127, `[i, o]` or `[L, i, o]`."""
    scale: Any
    """Scale of each output, `[1, o]` or `[L, 1, o]`."""

    @classmethod
    def from_array(cls, kernel):
        scale = jnp.maximum(jnp.abs(kernel).max(axis=-2, keepdims=True), 1e-12) / 127
        return cls(jnp.rint(kernel / scale).astype(jnp.int8), scale.astype(jnp.float32))

    @property
    def shape(self):
        return self.values.shape

    @property
    def dtype(self):
        return np.dtype(np.float32)

    def matmul(self, x, precision=None, weight_constraint=None):
        product = jnp.matmul(x, self.values.astype(x.dtype), precision=precision)
        return (product * self.scale[0]).astype(x.dtype)


def quantize(pipeline, pattern=r"^backbone/blocks/.*kernel$"):
    """Return the pipeline with the kernels whose paths match in 8 bits."""

    def convert(path, leaf):
        return Int8Kernel.from_array(leaf) if re.search(pattern, path) else leaf

    denoiser = map_with_path(convert, pipeline.denoiser_params)
    return pipeline.replace(denoiser=denoiser)
