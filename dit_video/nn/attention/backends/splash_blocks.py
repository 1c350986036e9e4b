"""Sizes of the blocks of splash attention's kernels."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from dit_video.core.errors import UserError

_LANES = 128
_MIN_LARGE_BLOCK_TOKENS = 8192


class KernelBlocks(NamedTuple):
    """Sizes of all blocks, as the kernels take them; see `SplashBlocks`."""

    block_q: int
    block_kv: int
    block_kv_compute: int
    block_q_dkv: int
    block_kv_dkv: int
    block_kv_dkv_compute: int
    block_q_dq: int
    block_kv_dq: int
    use_fused_bwd_kernel: bool

    @property
    def row_multiples(self) -> tuple[int, int]:
        """Return what the number of queries, and that of keys, of a row must be multiples of."""
        queries, keys = [self.block_q, self.block_q_dkv], [self.block_kv, self.block_kv_dkv]
        if not self.use_fused_bwd_kernel:
            queries, keys = [*queries, self.block_q_dq], [*keys, self.block_kv_dq]
        return math.lcm(*queries), math.lcm(*keys)

    def get_kernel_options(self) -> dict[str, Any]:
        """Return the arguments of JAX's `BlockSizes`; the fused backward pass has no kernel for queries alone."""
        without = {"block_q_dq": None, "block_kv_dq": None} if self.use_fused_bwd_kernel else {}
        return self._asdict() | without


@dataclass(frozen=True, kw_only=True)
class SplashBlocks:
    """Numbers of queries and keys in the blocks of the splash kernels, named as in JAX's `BlockSizes`.

    None of `block_q` and `block_kv` uses `choose_block_size`; None of the others uses these two. Blocks of more than
    1,024 take more on-chip memory than a kernel gets by default (see the TPU flags in `platform.xla_flags`).

    Raises:
      UserError: A size that is not a multiple of 128, or a block of keys that its part computed at a time does not
        divide.
    """

    block_q: int | None = None
    """Number of queries in a block of the forward pass."""
    block_kv: int | None = None
    """Number of keys in a block of the forward pass, which are in on-chip memory together."""
    block_kv_compute: int | None = None
    """Number of keys of a block that are multiplied at a time."""
    block_q_dkv: int | None = None
    """Number of queries in a block of the gradients of keys and values."""
    block_kv_dkv: int | None = None
    """Number of keys in a block of the gradients of keys and values."""
    block_kv_dkv_compute: int | None = None
    """Number of keys of such a block that are multiplied at a time."""
    block_q_dq: int | None = None
    """Number of queries in a block of the gradients of queries."""
    block_kv_dq: int | None = None
    """Number of keys in a block of the gradients of queries."""
    use_fused_bwd_kernel: bool = False
    """True to compute all gradients in one kernel, which takes 5 products of a block instead of 7, and keeps a copy of
    the queries' gradients for each block of keys."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if isinstance(size, int) and not isinstance(size, bool) and (size < 1 or size % _LANES):
                raise UserError(f"{field.name}={size} of splash attention is invalid; use a multiple of {_LANES}")
        for name, part_name in (("block_kv", "block_kv_compute"), ("block_kv_dkv", "block_kv_dkv_compute")):
            size, part = getattr(self, name), getattr(self, part_name)
            if size is not None and part is not None and size % part:
                raise UserError(f"{part_name}={part} is invalid: it does not divide {name}={size}. Use a divisor.")

    def resolve(self, queries: int, keys: int) -> KernelBlocks:
        """Return all sizes for a row of this many queries and keys; no block is longer than the row."""

        def limit(size: int | None, default: int, tokens: int) -> int:
            return min(size or default, tokens + -tokens % _LANES)

        block_q = limit(self.block_q, choose_block_size(queries), queries)
        block_kv = limit(self.block_kv, choose_block_size(keys), keys)
        block_kv_dkv = limit(self.block_kv_dkv, block_kv, keys)
        return KernelBlocks(
            block_q=block_q,
            block_kv=block_kv,
            # A block that is cut to the row's length may no longer be a multiple of the part.
            block_kv_compute=math.gcd(self.block_kv_compute or block_kv, block_kv),
            block_q_dkv=limit(self.block_q_dkv, block_q, queries),
            block_kv_dkv=block_kv_dkv,
            block_kv_dkv_compute=math.gcd(self.block_kv_dkv_compute or block_kv_dkv, block_kv_dkv),
            block_q_dq=limit(self.block_q_dq, block_q, queries),
            block_kv_dq=limit(self.block_kv_dq, block_kv, keys),
            use_fused_bwd_kernel=self.use_fused_bwd_kernel,
        )


DEFAULT_BLOCKS = SplashBlocks()


def choose_block_size(tokens: int) -> int:
    """Return the number of queries or keys in a block for a row with this many tokens.

    Keys and values are read once per block of queries. Blocks of 512 have 512 operations per byte, blocks of 1,024
    twice as many, and a v6e needs 560 to be compute-bound; larger blocks also mean a quarter as many kernel steps.
    Blocks above 1,024 need more on-chip memory than v5e and v5p give a kernel. Short rows have short clips, of which
    large blocks would mix several.
    """
    return 1024 if tokens >= _MIN_LARGE_BLOCK_TOKENS else 512
