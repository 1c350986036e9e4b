"""TPU: Pallas splash attention of JAX, told at run time which blocks to skip.

The kernel compares segment ids inside a block, but takes the blocks to visit from a table. JAX makes that table from a
mask that is known when a program is compiled. Here it is made inside the program from the row's own segments, so
foreign blocks are neither fetched nor computed, in the forward and in the backward pass.

Tested on CPU in Pallas' interpreter, and compiled ahead of time for v5e and v6e; not yet run on hardware. As with every
kernel, the compiler does not partition it: on several devices, call it under `jax.shard_map`.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dit_video.core.errors import UserError
from dit_video.nn.attention.api import Keys, Queries, name_of
from dit_video.nn.attention.key_ranges import given_back, padded, require_stretches, stretches, taken
from dit_video.nn.attention.masks import Full, Pattern, sight
from dit_video.nn.attention.tokens import Tokens

_LANES = 128
_LONG = 8192
_NO_QUERY, _NO_KEY = -1, -2
"""ids of what sees nothing, and of what nobody sees"""


@dataclass(frozen=True, kw_only=True)
class Splash:
    """Attention in blocks of queries by blocks of keys.

    Raises:
      UserError: a block that is not a multiple of 128, or a pattern whose queries see several stretches of keys.
    """

    pattern: Pattern = Full()
    block: int | None = None
    """queries, and keys, of a block; `default_block` of each by default"""
    interpret: bool = False
    """run by Pallas' interpreter, on any platform and slowly: for tests"""

    def __post_init__(self):
        if self.block is not None and (self.block < 1 or self.block % _LANES):
            raise UserError(f"blocks of splash attention are multiples of {_LANES} tokens, not {self.block}")
        require_stretches(self.pattern, "splash")

    def __call__(self, q: Queries, k: Keys, v: Keys, at: Tokens) -> Queries:
        at = at.without_bias("splash")
        q = q * q.shape[-1] ** -0.5
        if isinstance(self.pattern, Full):
            # Ids are all that the kernel needs: tokens stay where they are.
            ids = jnp.where(at.q_segments > 0, at.q_segments, _NO_QUERY)
            key_ids = jnp.where(at.kv_segments > 0, at.kv_segments, _NO_KEY)
            seen = ids >= 0
            if at.context_segments is not None:
                # Each with each, in one loop that keeps nothing: a sort of both takes longer than such attention does.
                seen = (ids[:, :, None] == key_ids[:, None, :]).any(axis=2)
            return jnp.where(seen[..., None, None], self._rows(q, k, v, ids, key_ids, jnp.zeros_like(ids)), 0)
        found = stretches(self.pattern, sight(self.pattern, at))
        seen = found.start < found.stop
        ids = jnp.where(seen, found.start, _NO_QUERY)
        q, k, v = taken(q, found.order), taken(k, found.key_order), taken(v, found.key_order)
        mixed = self._rows(q, k, v, ids, found.groups, found.stop)
        return given_back(jnp.where(seen[..., None, None], mixed, 0), found.order)

    def _rows(
        self,
        q: Float[Array, "B N K d"],
        k: Float[Array, "B M K d"],
        v: Float[Array, "B M K d"],
        ids: Int[Array, "B N"],
        key_ids: Int[Array, "B M"],
        ends: Int[Array, "B N"],
    ) -> Float[Array, "B N K d"]:
        """Rows take turns, as each has a table of its own. Padded to whole blocks, heads first."""
        length = q.shape[1]
        size, key_size = (self._block(number) for number in (length, k.shape[1]))
        heads = [jnp.moveaxis(padded(x, by), 2, 1) for x, by in ((q, size), (k, key_size), (v, key_size))]
        of_tokens = padded(ids, size, _NO_QUERY), padded(key_ids, key_size, _NO_KEY), padded(ends, size)
        name = name_of(queries=length, keys=k.shape[1])
        mixed = jax.lax.map(lambda row: self._row(row[:3], row[3:], size, key_size, name), (*heads, *of_tokens))
        return jnp.moveaxis(mixed, 1, 2)[:, :length]

    def _block(self, tokens: int) -> int:
        return min(self.block or default_block(tokens), tokens + -tokens % _LANES)

    def _row(
        self,
        heads: tuple[Float[Array, "K N d"], Float[Array, "K M d"], Float[Array, "K M d"]],
        of_tokens: tuple[Int[Array, " N"], Int[Array, " M"], Int[Array, " N"]],
        size: int,
        key_size: int,
        name: str | None,
    ) -> Float[Array, "K N d"]:
        """`heads` are queries, keys and values; `of_tokens` are ids of queries and keys, and ends of stretches; what is
        given has a `name`."""
        # Imported here: half a second, of use only where there is a TPU.
        from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds, splash_attention_kernel

        ids, key_ids, ends = of_tokens
        prefix = self.pattern.reach == "prefix"
        hit = _meeting(ids, key_ids, ends if prefix else None, size, key_size)
        # A block of queries that sees nothing still visits one block of keys: the kernel divides by what it summed.
        visited = hit | (~hit.any(axis=1, keepdims=True) & (jnp.arange(hit.shape[1]) == 0))
        kernel: Any = splash_attention_kernel.SplashAttentionKernel(
            _table(visited, ends if prefix else None, axis=1),
            _table(visited, ends if prefix else None, axis=1),
            _table(hit, ends if prefix else None, axis=0),
            block_sizes=splash_attention_kernel.BlockSizes(
                block_q=size,
                block_kv=key_size,
                block_kv_compute=key_size,
                block_q_dkv=size,
                block_kv_dkv=key_size,
                block_kv_dkv_compute=key_size,
                block_q_dq=size,
                block_kv_dq=key_size,
            ),
            is_mqa=False,
            save_residuals=False,
            mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            residual_checkpoint_name=name,
            mask_function=_before_the_end if prefix else None,
            interpret=self.interpret,
        )
        return kernel(*heads, SegmentIds(ids, key_ids))


def default_block(tokens: int) -> int:
    """Queries or keys of a block, where there are so many in a row.

    Keys and values are read again for each block of queries. In blocks of 512 that is 512 operations a byte, in blocks
    of 1,024 twice as many, while a v6e needs 560 to be busy; and there are a quarter as many blocks to start. Larger
    ones need more memory beside the processor than v5e and v5p give a kernel. In short rows clips are short, too, and
    of large blocks more is foreign.
    """
    return 1024 if tokens >= _LONG else 512


def _before_the_end(end: Array, place: Array) -> Array:
    return place < end


def _meeting(
    ids: Int[Array, " N"], key_ids: Int[Array, " M"], ends: Int[Array, " N"] | None, size: int, key_size: int
) -> Bool[Array, "n m"]:
    """Which blocks of queries and keys may have to do with each other, by the range of their ids."""
    least, most = _range(ids.reshape(-1, size))
    key_least, key_most = _range(key_ids.reshape(-1, key_size))
    meet = (least[:, None] <= key_most) & (key_least <= most[:, None])
    if ends is not None:
        meet &= jnp.arange(key_least.shape[0]) * key_size < ends.reshape(-1, size).max(axis=1)[:, None]
    return meet


def _range(ids: Int[Array, "n b"]) -> tuple[Int[Array, " n"], Int[Array, " n"]]:
    """The least and the most of the real ids in a block; an empty range where there are none."""
    real = ids >= 0
    limits = np.iinfo(np.int32)
    return jnp.where(real, ids, limits.max).min(axis=1), jnp.where(real, ids, limits.min).max(axis=1)


def _table(hit: Bool[Array, "n m"], ends: Int[Array, " N"] | None, *, axis: int) -> Any:
    """The kernel's table of blocks: whether to compute, and which block of keys (axis 1) or queries (axis 0) to have at
    hand: the next that is computed, or the last one again, so that nothing is fetched in vain."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info

    table: Any = splash_attention_mask_info.MaskInfo
    number = hit.shape[axis]
    places = jax.lax.broadcasted_iota(jnp.int32, hit.shape, axis)
    upcoming = jax.lax.cummin(jnp.where(hit, places, number), axis=axis, reverse=True)
    last = jnp.where(hit, places, 0).max(axis=axis, keepdims=True)
    following = jnp.where(upcoming == number, last, upcoming)
    # Tables lie in scalar memory, which is small.
    small = next(kind for kind in (jnp.int8, jnp.int16, jnp.int32) if number <= jnp.iinfo(kind).max)
    return table(
        data_next=following.astype(small)[None],
        mask_next=None,
        block_mask=hit.astype(jnp.int8)[None],
        partial_mask_blocks=None,
        q_sequence=ends,
    )
