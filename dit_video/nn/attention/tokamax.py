"""GPU backend: the attention kernels of tokamax, if that package is installed.

The project's tests do not run them on a GPU; they check the kernels' arguments with the XLA implementation of the same
function. On several devices, call the backend under `jax.shard_map`.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp

from dit_video.core.errors import UserError
from dit_video.nn.attention.api import AttentionInputs, Keys, Queries, name_calls
from dit_video.nn.attention.chunked import find_key_ranges, reorder, require_key_ranges, restore_order
from dit_video.nn.attention.masks import Full, Pattern, mask_boxes


@dataclass(frozen=True, kw_only=True)
class TokamaxAttention:
    """tokamax's attention kernels with one range of keys per query, in memory that is linear in the row.

    `mosaic_gpu` is for Hopper and Blackwell. Its forward pass skips blocks outside the ranges. Its backward pass on
    Hopper, as of 0.0.12, visits all blocks and masks them. (The backward pass of `triton` builds a dense mask.) The
    results have no checkpoint name, so every remat policy but `none` recomputes them. The public function of 0.0.12
    takes no key ranges, so this class calls the operations below it. `xla` runs on any platform and is meant for tests.

    Raises:
      UserError: If tokamax is not installed, or the pattern's queries see several ranges of keys.
    """

    pattern: Pattern = Full()
    implementation: Literal["mosaic_gpu", "triton", "xla"] = "mosaic_gpu"

    def __post_init__(self):
        require_key_ranges(self.pattern, "tokamax")
        _load_operations()

    @name_calls("tokamax")
    def __call__(self, q: Queries, k: Keys, v: Keys, inputs: AttentionInputs) -> Queries:
        ranges = find_key_ranges(self.pattern, mask_boxes(self.pattern, inputs.require_no_bias("tokamax")))
        sees_any = ranges.start < ranges.stop
        # The kernel must not compute a softmax over no scores: queries without keys see the first key, and their
        # outputs are set to zero afterwards.
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
