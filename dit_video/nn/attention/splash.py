"""TPU backend: JAX's Pallas splash attention, which here chooses the blocks to skip at run time.

The kernel compares segment ids inside a block, but reads the blocks to visit from a table. JAX builds that table from a
mask that is known at compile time. This module builds it inside the program from the row's own segments, so both passes
neither fetch nor compute blocks of other segments.

Tested on CPU in Pallas' interpreter, and compiled ahead of time for v5e and v6e; not yet run on hardware. The compiler
does not partition kernels: on several devices, call it under `jax.shard_map`.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dit_video.core.errors import UserError
from dit_video.nn.attention.api import AttentionInputs, Keys, Queries, get_checkpoint_name, name_calls
from dit_video.nn.attention.chunked import find_key_ranges, pad_to_blocks, reorder, require_key_ranges, restore_order
from dit_video.nn.attention.masks import Full, Pattern, mask_boxes

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
        """Return the numbers whose multiples a row's query count and key count must be."""
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

    If `block_q` or `block_kv` is None, `choose_block_size` sets it; the others default to these two. Blocks above 1,024
    take more on-chip memory than a kernel gets by default (see the TPU flags in `platform.xla_flags`).

    Raises:
      UserError: If a size is not a multiple of 128, or a `_compute` size does not divide its block of keys.
    """

    block_q: int | None = None
    """Number of queries in a block of the forward pass."""
    block_kv: int | None = None
    """Number of keys in a block of the forward pass; they are in on-chip memory together."""
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
    """True to compute all gradients in one kernel, which takes 5 products per block instead of 7 and keeps a copy of
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
            # A block that is cut to the row's length may no longer be a multiple of its `_compute` size.
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
    Blocks above 1,024 need more on-chip memory than v5e and v5p give a kernel. Short rows hold short clips, and large
    blocks would mix several of them.
    """
    return 1024 if tokens >= _MIN_LARGE_BLOCK_TOKENS else 512


_NO_QUERY, _NO_KEY = -1, -2
"""Ids of queries that see nothing, and of keys that no query sees; they differ, so that they never match."""


@dataclass(frozen=True, kw_only=True)
class SplashAttention:
    """Attention by the splash kernel, in blocks of queries by blocks of keys.

    Raises:
      UserError: If the pattern's queries see several ranges of keys.
    """

    pattern: Pattern = Full()
    blocks: SplashBlocks = DEFAULT_BLOCKS
    interpret: bool = False
    """True to run in Pallas' interpreter, slowly and on any platform, for tests."""

    def __post_init__(self):
        require_key_ranges(self.pattern, "splash")

    @name_calls("splash")
    def __call__(self, q: Queries, k: Keys, v: Keys, inputs: AttentionInputs) -> Queries:
        inputs = inputs.require_no_bias("splash")
        q = q * q.shape[-1] ** -0.5
        if isinstance(self.pattern, Full):
            # The kernel only needs segment ids, so the tokens are not sorted.
            ids = jnp.where(inputs.q_segments > 0, inputs.q_segments, _NO_QUERY)
            key_ids = jnp.where(inputs.kv_segments > 0, inputs.kv_segments, _NO_KEY)
            sees_any = ids >= 0
            if inputs.context_segments is not None:
                # All pairs are compared in one fused loop; sorting both would take longer than the attention itself.
                sees_any = (ids[:, :, None] == key_ids[:, None, :]).any(axis=2)
            mixed = self._attend_rows(q, k, v, ids, key_ids, jnp.zeros_like(ids))
            return jnp.where(sees_any[..., None, None], mixed, 0)
        ranges = find_key_ranges(self.pattern, mask_boxes(self.pattern, inputs))
        sees_any = ranges.start < ranges.stop
        ids = jnp.where(sees_any, ranges.start, _NO_QUERY)
        q, k, v = reorder(q, ranges.query_order), reorder(k, ranges.key_order), reorder(v, ranges.key_order)
        mixed = self._attend_rows(q, k, v, ids, ranges.group_starts, ranges.stop)
        return restore_order(jnp.where(sees_any[..., None, None], mixed, 0), ranges.query_order)

    def _attend_rows(
        self,
        q: Float[Array, "B N K d"],
        k: Float[Array, "B M K d"],
        v: Float[Array, "B M K d"],
        ids: Int[Array, "B N"],
        key_ids: Int[Array, "B M"],
        ends: Int[Array, "B N"],
    ) -> Float[Array, "B N K d"]:
        """Compute attention of all rows, padded to whole blocks, one after another: each has its own block table."""
        length = q.shape[1]
        blocks = self.blocks.resolve(length, k.shape[1])
        size, key_size = blocks.row_multiples
        heads = [jnp.moveaxis(pad_to_blocks(x, block), 2, 1) for x, block in ((q, size), (k, key_size), (v, key_size))]
        ids, key_ids = pad_to_blocks(ids, size, _NO_QUERY), pad_to_blocks(key_ids, key_size, _NO_KEY)
        rows = (*heads, ids, key_ids, pad_to_blocks(ends, size))
        name = get_checkpoint_name(queries=length, keys=k.shape[1])
        mixed = jax.lax.map(lambda row: self._attend_row(row[:3], row[3:], blocks, name), rows)
        return jnp.moveaxis(mixed, 1, 2)[:, :length]

    def _attend_row(
        self,
        heads: tuple[Float[Array, "K N d"], Float[Array, "K M d"], Float[Array, "K M d"]],
        token_data: tuple[Int[Array, " N"], Int[Array, " M"], Int[Array, " N"]],
        blocks: KernelBlocks,
        name: str | None,
    ) -> Float[Array, "K N d"]:
        """Compute attention of one row.

        Args:
          heads: Queries, keys and values.
          token_data: Ids of the queries, ids of the keys, and ends of the queries' key ranges.
          blocks: Sizes of the blocks.
          name: Checkpoint name of the kernel's residuals.
        """
        # Imported here because it takes half a second and is only needed on a TPU.
        from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds, splash_attention_kernel

        ids, key_ids, ends = token_data
        prefix = self.pattern.locality == "prefix"
        end_table = ends if prefix else None

        def build_query_table(block_q: int, block_kv: int) -> Any:
            overlaps = _find_overlaps(ids, key_ids, end_table, block_q, block_kv)
            # A query block that sees nothing still visits one key block, because the kernel divides by the sum of
            # weights.
            visited = overlaps | (~overlaps.any(axis=1, keepdims=True) & (jnp.arange(overlaps.shape[1]) == 0))
            return _build_block_table(visited, end_table, axis=1)

        fused = blocks.use_fused_bwd_kernel
        key_overlaps = _find_overlaps(ids, key_ids, end_table, blocks.block_q_dkv, blocks.block_kv_dkv)
        kernel: Any = splash_attention_kernel.SplashAttentionKernel(
            build_query_table(blocks.block_q, blocks.block_kv),
            None if fused else build_query_table(blocks.block_q_dq, blocks.block_kv_dq),
            _build_block_table(key_overlaps, end_table, axis=0),
            block_sizes=splash_attention_kernel.BlockSizes(**blocks.get_kernel_options()),
            is_mqa=False,
            save_residuals=False,
            mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            residual_checkpoint_name=name,
            mask_function=_is_before_end if prefix else None,
            interpret=self.interpret,
        )
        return kernel(*heads, SegmentIds(ids, key_ids))


def _is_before_end(end: Array, position: Array) -> Array:
    return position < end


def _find_overlaps(
    ids: Int[Array, " N"],
    key_ids: Int[Array, " M"],
    ends: Int[Array, " N"] | None,
    size: int,
    key_size: int,
) -> Bool[Array, "n m"]:
    """Return which query and key blocks may contain visible pairs, judged by the ranges of their ids."""
    lowest, highest = _compute_id_range(ids.reshape(-1, size))
    key_lowest, key_highest = _compute_id_range(key_ids.reshape(-1, key_size))
    overlaps = (lowest[:, None] <= key_highest) & (key_lowest <= highest[:, None])
    if ends is not None:
        overlaps &= jnp.arange(key_lowest.shape[0]) * key_size < ends.reshape(-1, size).max(axis=1)[:, None]
    return overlaps


def _compute_id_range(ids: Int[Array, "n b"]) -> tuple[Int[Array, " n"], Int[Array, " n"]]:
    """Return the minimum and the maximum of the real ids in each block; an empty range if there are none."""
    real = ids >= 0
    limits = np.iinfo(np.int32)
    return jnp.where(real, ids, limits.max).min(axis=1), jnp.where(real, ids, limits.min).max(axis=1)


def _build_block_table(overlaps: Bool[Array, "n m"], ends: Int[Array, " N"] | None, *, axis: int) -> Any:
    """Return the kernel's table of blocks.

    It says whether to compute a block, and which block of keys (axis 1) or queries (axis 0) to prefetch: the next one
    to compute, or the last one again so that no fetch is wasted.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info

    table: Any = splash_attention_mask_info.MaskInfo
    number = overlaps.shape[axis]
    index = jax.lax.broadcasted_iota(jnp.int32, overlaps.shape, axis)
    upcoming = jax.lax.cummin(jnp.where(overlaps, index, number), axis=axis, reverse=True)
    last = jnp.where(overlaps, index, 0).max(axis=axis, keepdims=True)
    next_block = jnp.where(upcoming == number, last, upcoming)
    # Tables are kept in scalar memory, which is small, so they use the smallest integer type.
    dtype = next(kind for kind in (jnp.int8, jnp.int16, jnp.int32) if number <= jnp.iinfo(kind).max)
    return table(
        data_next=next_block.astype(dtype)[None],
        mask_next=None,
        block_mask=overlaps.astype(jnp.int8)[None],
        partial_mask_blocks=None,
        q_sequence=ends,
    )
