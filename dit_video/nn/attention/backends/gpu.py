"""GPU: cuDNN's attention through JAX, and tokamax's kernels where that package is installed.

Neither has been run on a GPU by this project's tests: what is tested is what they are given, with the same functions'
XLA implementations. On several devices, call them under `jax.shard_map`.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dit_video.core.errors import UserError
from dit_video.nn.attention.api import Keys, Queries
from dit_video.nn.attention.key_ranges import given_back, require_stretches, stretches, taken
from dit_video.nn.attention.masks import Full, Pattern, sight, visible
from dit_video.nn.attention.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Cudnn:
    """cuDNN's fused attention under the dense mask, in bfloat16 or float16: every pattern, and no block is skipped.

    JAX hands a mask to cuDNN as a bias of N × M values, so memory is quadratic in the row, once for all heads.
    """

    pattern: Pattern = Full()
    implementation: Literal["cudnn", "xla"] = "cudnn"
    """"xla" is JAX's own, on any platform: for tests"""

    def __call__(self, q: Queries, k: Keys, v: Keys, at: Tokens) -> Queries:
        if self.implementation == "cudnn" and q.dtype not in (jnp.bfloat16, jnp.float16):
            raise UserError(f"cuDNN's attention computes in bfloat16 or float16, not {q.dtype}; set the model's dtype")
        mask = visible(sight(self.pattern, at.without_bias("cudnn")))
        mixed = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation=self.implementation)
        return jnp.where(mask.any(axis=-1)[..., None, None], mixed, 0)


@dataclass(frozen=True, kw_only=True)
class Tokamax:
    """tokamax's kernels, given one stretch of keys for every query: blocks outside it are skipped, memory is linear.

    `mosaic_gpu` is for Hopper and Blackwell; its backward pass takes stretches, too (that of `triton`, as of 0.0.12,
    makes a dense mask of them). The public function of 0.0.12 doesn't take stretches, so the operations under it are
    called; `xla` runs on any platform, for tests.

    Raises:
      UserError: tokamax is not installed, or a pattern whose queries see several stretches of keys.
    """

    pattern: Pattern = Full()
    implementation: Literal["mosaic_gpu", "triton", "xla"] = "mosaic_gpu"

    def __post_init__(self):
        require_stretches(self.pattern, "tokamax")
        _operations()

    def __call__(self, q: Queries, k: Keys, v: Keys, at: Tokens) -> Queries:
        found = stretches(self.pattern, sight(self.pattern, at.without_bias("tokamax")))
        seen = found.start < found.stop
        # No kernel is asked for a softmax of nothing: such queries see the first key, and get zeros afterwards.
        start, stop = jnp.where(seen, found.start, 0), jnp.where(seen, found.stop, 1)
        operations, mask = _operations()
        mixed = operations[self.implementation](
            taken(q, found.order),
            taken(k, found.key_order),
            taken(v, found.key_order),
            mask=mask(k_start=start[:, None], k_end=stop[:, None]),
        )
        return given_back(jnp.where(seen[..., None, None], mixed, 0), found.order)


def _operations() -> tuple[Any, Any]:
    """tokamax's implementations by name, and its type of masks."""
    try:
        from tokamax._src.ops.attention import api, base
    except ImportError as error:
        raise UserError(
            f"the attention backend tokamax needs its package ({error}); pip install tokamax, or use cudnn or chunked"
        ) from error
    return api.IMPLEMENTATIONS, base.Mask
