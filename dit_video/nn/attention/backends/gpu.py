"""GPU backends: cuDNN's attention through JAX, and tokamax's kernels if that package is installed.

This project's tests run neither on a GPU: they test the kernels' arguments, with the XLA implementations of the same
functions. On several devices, call the backends under `jax.shard_map`.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dit_video.core.errors import UserError
from dit_video.nn.attention.api import Keys, Queries
from dit_video.nn.attention.inputs import AttentionInputs
from dit_video.nn.attention.key_ranges import find_key_ranges, reorder, require_key_ranges, restore_order
from dit_video.nn.attention.masks import Full, Pattern, dense_mask, mask_boxes


@dataclass(frozen=True, kw_only=True)
class CudnnAttention:
    """cuDNN's fused attention with the dense mask, in bfloat16 or float16, for every pattern; it skips no block.

    JAX passes the mask to cuDNN as a bias of N × M values, shared by all heads, so memory is quadratic in the row.
    """

    pattern: Pattern = Full()
    implementation: Literal["cudnn", "xla"] = "cudnn"
    """Implementation in JAX; "xla" runs on any platform and is meant for tests."""

    def __call__(self, q: Queries, k: Keys, v: Keys, inputs: AttentionInputs) -> Queries:
        if self.implementation == "cudnn" and q.dtype not in (jnp.bfloat16, jnp.float16):
            raise UserError(f"cuDNN attention supports bfloat16 or float16, not {q.dtype}; set the model's dtype")
        mask = dense_mask(mask_boxes(self.pattern, inputs.require_no_bias("cudnn")))
        mixed = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation=self.implementation)
        return jnp.where(mask.any(axis=-1)[..., None, None], mixed, 0)


@dataclass(frozen=True, kw_only=True)
class TokamaxAttention:
    """tokamax's attention kernels with one range of keys per query: other blocks are skipped, and memory is linear.

    `mosaic_gpu` is for Hopper and Blackwell, and its backward pass supports key ranges too (that of `triton`, as of
    0.0.12, builds a dense mask). The public function of 0.0.12 takes no key ranges, so the operations below it are
    called. `xla` runs on any platform and is meant for tests.

    Raises:
      UserError: tokamax is not installed, or a pattern whose queries see several ranges of keys.
    """

    pattern: Pattern = Full()
    implementation: Literal["mosaic_gpu", "triton", "xla"] = "mosaic_gpu"

    def __post_init__(self):
        require_key_ranges(self.pattern, "tokamax")
        _load_operations()

    def __call__(self, q: Queries, k: Keys, v: Keys, inputs: AttentionInputs) -> Queries:
        ranges = find_key_ranges(self.pattern, mask_boxes(self.pattern, inputs.require_no_bias("tokamax")))
        sees_any = ranges.start < ranges.stop
        # The kernel must not compute the softmax of no scores: queries without keys see the first key, and are set to
        # zero afterwards.
        start, stop = jnp.where(sees_any, ranges.start, 0), jnp.where(sees_any, ranges.stop, 1)
        operations, mask = _load_operations()
        mixed = operations[self.implementation](
            reorder(q, ranges.query_order),
            reorder(k, ranges.key_order),
            reorder(v, ranges.key_order),
            mask=mask(k_start=start[:, None], k_end=stop[:, None]),
        )
        return restore_order(jnp.where(sees_any[..., None, None], mixed, 0), ranges.query_order)


def _load_operations() -> tuple[Any, Any]:
    """Return tokamax's implementations by name, and its mask class."""
    try:
        from tokamax._src.ops.attention import api, base
    except ImportError as error:
        raise UserError(
            f"the backend tokamax needs that package ({error}); pip install tokamax, or use cudnn or chunked"
        ) from error
    return api.IMPLEMENTATIONS, base.Mask
