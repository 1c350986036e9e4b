"""Attention of a model whose rows, heads and tokens are sharded over devices.

Attention is the only operation of a transformer that mixes tokens of a row; everything else is computed per token, and
the compiler partitions it by the sharding of its arrays. So a denoiser is made with attention functions of the mesh,
its linear layers with the sharding of their weights during use (`GatheredWeight`, `HeadSharded`), and the rest of the
model does not depend on devices. Under `jax.shard_map` each device gets its rows (`data`, `fsdp`), its heads (`tensor`)
and its tokens (`context`), and computes with the model's own backend. There are two methods for tokens on several
devices of `context`:

- `ulysses` (arXiv 2309.14509): an all-to-all gives every device all tokens of some of its heads, and another one
  returns the result. 8 of them per layer and training step (12 with recomputation), each of `(c - 1) / c` of a device's
  values. It supports every backend and pattern, and a bias of the scores.
- `ring` (arXiv 2310.01889): see `ring`. It supports any number of heads, every pattern and a bias; it computes its own
  blocks, those of the backend `chunked`.

Both respect segments. With `ulysses` the backend skips blocks that are masked; a rank of a `ring` skips the keys of
ranks with which it shares no segment. The keys of cross-attention are replicated over the devices of `context`.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PyTree

from dit_video.core.errors import UserError
from dit_video.core.platform.devices import Platform
from dit_video.distributed.mesh import AnyMesh, ContextAttention, Parallelism, make_abstract_mesh, make_mesh
from dit_video.distributed.sharding import (
    DEFAULT_RULES,
    ROW_AXES,
    STATE_AXES,
    LayerInputs,
    choose_kernel_split,
    compute_sharded_gradient,
)
from dit_video.nn.attention import (
    Attention,
    AttentionInputs,
    Backend,
    Bias,
    Full,
    Pattern,
    RelativeBias,
    get_backend_name,
)
from dit_video.nn.attention.api import Keys, Queries, mark_checkpoint, name_calls
from dit_video.nn.attention.chunked import EMPTY_LSE, attend_part, compute_part_gradients, pad_to_blocks
from dit_video.nn.layers import compute_kernel_gradient
from dit_video.nn.partitioner import FusedConstraint, Partitioner, Precision, Split, WeightConstraint

_MAX_SEGMENT = int(np.iinfo(np.int32).max)


@dataclass(frozen=True)
class RingAttention:
    """Attention among the tokens of a row on `ranks` devices along the mesh axis `axis`.

    Blocks of `chunk` queries by `chunk` keys are computed as by the backend `chunked`, for every pattern.
    """

    axis: str
    ranks: int
    pattern: Pattern = Full()
    chunk: int = 256

    @name_calls("ring")
    def __call__(self, q: Queries, k: Keys, v: Keys, inputs: AttentionInputs) -> Queries:
        """Return the attention of this rank's `q`, `k` and `v`; `meta` is that of the whole row."""
        bias = inputs.bias
        if bias is None:
            return _ring_attention(self, None, q, k, v, None, inputs)
        # The gradient of the table is computed separately.
        without_table = inputs._replace(bias=replace(bias, table=jnp.zeros((0, 0))))
        return _ring_attention(self, bias.config, q, k, v, bias.table, without_table)

    def send_to_next(self, arrays: PyTree) -> PyTree:
        """Send arrays to the next rank."""
        pairs = [(rank, (rank + 1) % self.ranks) for rank in range(self.ranks)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, pairs), arrays)

    def select_tokens(
        self, relative: RelativeBias | None, table: Array | None, inputs: AttentionInputs, steps: Int[Array, ""] | int
    ) -> AttentionInputs:
        """Return the tokens of this rank's queries, and of the keys that started `steps` ranks behind."""
        rank = jax.lax.axis_index(self.axis)
        source = (rank - steps) % self.ranks

        def part(rows, index):
            size = 0 if rows is None else rows.shape[1] // self.ranks
            return None if rows is None else jax.lax.dynamic_slice_in_dim(rows, index * size, size, axis=1)

        bias = None
        if inputs.bias is not None:
            assert relative is not None
            assert table is not None
            positions = part(inputs.bias.q_positions, rank), part(inputs.bias.kv_positions, source)
            bias = Bias(config=relative, table=table, q_positions=positions[0], kv_positions=positions[1])
        return AttentionInputs(
            part(inputs.q_segments, rank),
            part(inputs.kv_segments, source),
            part(inputs.q_indices, rank),
            part(inputs.kv_indices, source),
            bias,
        )


def _has_common_segments(inputs: AttentionInputs) -> Bool[Array, ""]:
    """Return whether the ranges of segment ids of queries and keys overlap in any row."""
    min_segment, max_segment = _get_segment_range(inputs.q_segments)
    key_min, key_max = _get_segment_range(inputs.kv_segments)
    return ((min_segment <= key_max) & (key_min <= max_segment)).any()


def _get_segment_range(segments: Int[Array, "B N"]) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Return the smallest and the largest segment of each row; the range is empty if there is only padding."""
    return jnp.where(segments > 0, segments, _MAX_SEGMENT).min(axis=1), segments.max(axis=1)


class _PartialAttention(NamedTuple):
    """Attention over the keys so far, and the logarithms of the sums of exponentials; float32."""

    out: Queries
    lse: Float[Array, "B K N"]

    def merge(self, other: "_PartialAttention") -> "_PartialAttention":
        """Return the attention over the keys of both parts."""
        # The log-sum-exp of no keys is `NOTHING`, a large positive number that makes exp(score - lse) zero in the
        # backward pass. For the weights of the merge it has to be a large negative one.
        own_lse, other_lse = (jnp.where(lse >= EMPTY_LSE, -EMPTY_LSE, lse) for lse in (self.lse, other.lse))
        max_lse = jnp.maximum(own_lse, other_lse)
        weights = jnp.exp(own_lse - max_lse), jnp.exp(other_lse - max_lse)
        total = weights[0] + weights[1]
        out = _move_heads_last(weights[0] / total) * self.out + _move_heads_last(weights[1] / total) * other.out
        return _PartialAttention(out, jnp.where(max_lse > -EMPTY_LSE, max_lse + jnp.log(total), EMPTY_LSE))


def _move_heads_last(values: Float[Array, "B K N"]) -> Float[Array, "B N K 1"]:
    return jnp.moveaxis(values, 1, 2)[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring_attention(ring: RingAttention, relative: RelativeBias | None, q, k, v, table, inputs: AttentionInputs):
    return _forward(ring, relative, q, k, v, table, inputs)[0]


def _forward(ring: RingAttention, relative: RelativeBias | None, q, k, v, table, inputs: AttentionInputs):
    def attend_and_merge(steps, keys, values, partial):
        pair = ring.select_tokens(relative, table, inputs, steps)

        def attend():
            part = attend_part(q, keys, values, pair, pattern=ring.pattern, chunk=ring.chunk)
            return partial.merge(_PartialAttention(*part))

        return jax.lax.cond(_has_common_segments(pair), attend, lambda: partial)

    def step(steps, carry):
        (keys, values), partial = carry
        return ring.send_to_next((keys, values)), attend_and_merge(steps, keys, values, partial)

    lse_shape = q.shape[0], q.shape[2], q.shape[1]
    initial = _PartialAttention(jnp.zeros((*q.shape[:3], v.shape[3])), jnp.full(lse_shape, EMPTY_LSE))
    # The last keys are not sent on: they would only return home.
    (keys, values), partial = jax.lax.fori_loop(0, ring.ranks - 1, step, ((k, v), initial))
    partial = attend_and_merge(ring.ranks - 1, keys, values, partial)
    out, lse = mark_checkpoint(partial, queries=q.shape[1], keys=k.shape[1])
    return out.astype(v.dtype), (q, k, v, table, inputs, out, lse)


def _backward(ring: RingAttention, relative: RelativeBias | None, saved, d_out):
    q, k, v, table, meta, out, lse = saved
    delta = jnp.moveaxis((out * d_out.astype(jnp.float32)).sum(axis=-1), 2, 1)
    zeros = jnp.zeros(q.shape), jnp.zeros(k.shape), jnp.zeros(v.shape), None if table is None else table * 0.0

    def gradients(steps, keys, values):
        pair = ring.select_tokens(relative, table, meta, steps)

        def attend():
            kinds: dict[str, Any] = {"pattern": ring.pattern, "chunk": ring.chunk}
            return compute_part_gradients(q, keys, values, pair, lse=lse, delta=delta, d_out=d_out, **kinds)

        return jax.lax.cond(_has_common_segments(pair), attend, lambda: zeros)

    def add_gradients(steps, keys_values, sums):
        (d_keys, d_values), (d_q, d_table) = sums
        more_q, *more, more_table = gradients(steps, *keys_values)
        d_keys, d_values = ring.send_to_next((d_keys + more[0], d_values + more[1]))
        return (d_keys, d_values), (d_q + more_q, None if d_table is None else d_table + more_table)

    def step(steps, carry):
        keys_values, sums = carry
        return ring.send_to_next(keys_values), add_gradients(steps, keys_values, sums)

    # A gradient of keys has to visit the same devices as its keys and then return to their owner: the loop starts with
    # the neighbour's keys, and the gradient from this device's own keys is added when the others arrive.
    d_q, *own_gradients, d_table = gradients(0, k, v)
    initial = ring.send_to_next((k, v)), (zeros[1:3], (d_q, d_table))
    keys_values, sums = jax.lax.fori_loop(1, ring.ranks - 1, step, initial)
    (d_k, d_v), (d_q, d_table) = add_gradients(ring.ranks - 1, keys_values, sums)
    d_k, d_v = d_k + own_gradients[0], d_v + own_gradients[1]
    return *(g.astype(x.dtype) for g, x in zip((d_q, d_k, d_v), (q, k, v), strict=True)), d_table, None


_ring_attention.defvjp(_forward, _backward)


_HEAD_SPEC = P(ROW_AXES, "context", "tensor", None)
_FULL_SPEC = P(ROW_AXES, None, "tensor", None)


def make_partitioner(parallel: Parallelism, devices: Sequence[jax.Device] | None = None) -> "MeshPartitioner":
    """Return what a model is made with (`config.make(rngs, partitioner)`) to be computed on `devices`, all by default.

    Raises:
      UserError: As `make_mesh`.
    """
    return MeshPartitioner(make_mesh(parallel, devices), parallel.context_attention)


def make_abstract_partitioner(parallel: Parallelism, count: int) -> "MeshPartitioner":
    """Return what a model is made with to be planned for `count` devices, which need not exist.

    Raises:
      UserError: As `make_abstract_mesh`.
    """
    return MeshPartitioner(make_abstract_mesh(parallel, count), parallel.context_attention)


@dataclass(frozen=True)
class MeshPartitioner(Partitioner):
    """Attention over the devices of a mesh, and weights that are gathered or resharded for their use.

    A model's parameters do not depend on it. A mesh of one device leaves its attention and weights as they are.
    """

    mesh: AnyMesh
    context_attention: ContextAttention

    @property
    def platform(self) -> Platform:
        if isinstance(self.mesh, jax.sharding.AbstractMesh):
            return super().platform
        return Platform.from_device(self.mesh.devices.flat[0])

    def make_attention(self, backend: Backend, pattern: Pattern = Full()) -> Attention:
        """Return the attention among a row's tokens.

        Raises:
          UserError: If a ring has a backend that is not `auto` or `chunked`.
        """
        ranks = self.mesh.shape["context"]
        if ranks > 1 and self.context_attention == "ring":
            check_ring(backend)
            return ShardedAttention(self.mesh, RingAttention("context", ranks, pattern), "ring")
        attention = super().make_attention(backend, pattern)
        return attention if self.mesh.size == 1 else ShardedAttention(self.mesh, attention, "ulysses")

    def make_cross_attention(self, backend: Backend) -> Attention:
        attention = super().make_cross_attention(backend)
        return attention if self.mesh.size == 1 else ShardedAttention(self.mesh, attention, "cross")

    def make_weight_constraint(self, split: Split | None, *, is_context: bool = False) -> WeightConstraint | None:
        if all(self.mesh.shape[axis] == 1 for axis in STATE_AXES):
            return None
        # Inputs of layers without a split may be tokens, or conditioning of a few clips.
        inputs: LayerInputs | None = None if split is None else "context" if is_context else "tokens"
        if split is None or self.mesh.shape["tensor"] == 1:
            return GatheredWeight(self.mesh, P(), inputs)
        specs = {"outputs": P(None, "tensor"), "inputs": P("tensor", None)}
        return GatheredWeight(self.mesh, specs[split], inputs) if split in specs else None

    def make_fused_constraint(self) -> FusedConstraint | None:
        return HeadSharded(self.mesh) if self.mesh.shape["tensor"] > 1 else None


def check_ring(backend: Backend) -> None:
    """Raise UserError for a backend that ring attention does not support."""
    if (name := get_backend_name(backend)) not in ("auto", "chunked"):
        raise UserError(
            f"attention={name!r} is invalid: ring attention computes its own blocks, those of chunked. Use the "
            "denoiser's attention='chunked', or context_attention='ulysses'."
        )


def check_ulysses(heads: int, ranks: int) -> None:
    """Raise UserError if the devices of `context` do not divide the heads of one shard of `tensor`."""
    if heads % ranks:
        valid = [str(size) for size in range(1, heads + 1) if heads % size == 0]
        raise UserError(
            f"context={ranks} is invalid: ulysses gives each of context={ranks} devices some of {heads} heads, which "
            f"do not divide. Use context={' or '.join(valid)}, or context_attention='ring'."
        )


@dataclass(frozen=True)
class ShardedAttention:
    """An attention function on a mesh: `inner` is what each device computes.

    Tokens are padded to a multiple of the devices of `context`.
    """

    mesh: AnyMesh
    inner: Attention
    method: str
    """Method: `ulysses`, `ring`, or `cross`, whose keys are replicated over the devices of `context`."""

    def __call__(self, q: Queries, k: Keys, v: Keys, inputs: AttentionInputs) -> Queries:
        ranks, length = self.mesh.shape["context"], q.shape[1]
        # Padding belongs to no segment, so that no token sees it; its outputs are cut off below.
        inputs = _pad_tokens(inputs, ranks, keys=self.method != "cross")
        q = pad_to_blocks(q, ranks)
        if self.method != "cross":
            k, v = pad_to_blocks(k, ranks), pad_to_blocks(v, ranks)
        keys = _FULL_SPEC if self.method == "cross" else _HEAD_SPEC
        on_rank = {"ulysses": self._ulysses, "ring": self.inner, "cross": self._cross}[self.method]
        mixed = jax.shard_map(
            on_rank,
            mesh=self.mesh,
            in_specs=(_HEAD_SPEC, keys, keys, _make_specs(inputs)),
            out_specs=_HEAD_SPEC,
            check_vma=False,
        )(q, k, v, inputs)
        return mixed[:, :length]

    def _ulysses(self, q: Queries, k: Keys, v: Keys, inputs: AttentionInputs) -> Queries:
        ranks = self.mesh.shape["context"]
        if ranks == 1:
            return self.inner(q, k, v, inputs)
        check_ulysses(q.shape[2], ranks)
        q, k, v = (jax.lax.all_to_all(x, "context", split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
        if inputs.bias is not None:
            first = jax.lax.axis_index("context") * q.shape[2]
            table = jax.lax.dynamic_slice_in_dim(inputs.bias.table, first, q.shape[2], axis=1)
            inputs = inputs._replace(bias=replace(inputs.bias, table=table))
        mixed = self.inner(q, k, v, inputs)
        return jax.lax.all_to_all(mixed, "context", split_axis=1, concat_axis=2, tiled=True)

    def _cross(self, q: Queries, k: Keys, v: Keys, inputs: AttentionInputs) -> Queries:
        first = jax.lax.axis_index("context") * q.shape[1]
        local_segments = jax.lax.dynamic_slice_in_dim(inputs.q_segments, first, q.shape[1], axis=1)
        return self.inner(q, k, v, inputs._replace(q_segments=local_segments))


@dataclass(frozen=True)
class GatheredWeight:
    """A weight that `fsdp` and `context` shard, gathered before use, once for a forward and once for a backward pass.

    Otherwise XLA's partitioner would gather a weight again for each product, in a different layout each time, or might
    gather tokens instead.

    Weights are gathered over `context`, and the result over `fsdp`: XLA for TPUs makes an all-reduce of a small gather
    over all devices of a slice, which moves twice the bytes.
    """

    mesh: AnyMesh
    spec: P
    inputs: LayerInputs | None = None
    """Inputs of the layer; None leaves it to XLA how the gradient is summed."""

    def __call__(self, kernel: Float[Array, "i o"]) -> Float[Array, "i o"]:
        axis, names = choose_kernel_split(kernel.shape, self.spec, self.mesh) or (0, ())
        if names == STATE_AXES and kernel.size >= DEFAULT_RULES.min_size:  # smaller ones may be replicated at rest
            part = [*self.spec, None, None][:2]
            part[axis] = "fsdp"
            kernel = jax.lax.with_sharding_constraint(kernel, NamedSharding(self.mesh, P(*part)))
        return jax.lax.with_sharding_constraint(kernel, NamedSharding(self.mesh, self.spec))

    def constrain_factors(
        self, a: Float[Array, "i r"], b: Float[Array, "r o"]
    ) -> tuple[Float[Array, "i r"], Float[Array, "r o"]]:
        """Shard the factors of a LoRA adapter like their kernel; otherwise XLA would shard the activations instead."""
        inputs, outputs = (*self.spec, None, None)[:2]
        layouts = P(inputs, None), P(None, outputs)
        return tuple(
            jax.lax.with_sharding_constraint(factor, NamedSharding(self.mesh, spec))
            for factor, spec in zip((a, b), layouts, strict=True)
        )

    def compute_gradient(
        self, x: Float[Array, "*batch i"], cotangent: Float[Array, "*batch o"], precision: Precision = None
    ) -> Float[Array, "i o"]:
        """Return the kernel's gradient, each part of it on the devices that hold this part of the kernel."""
        if self.inputs is None:
            return compute_kernel_gradient(x, cotangent, precision)
        return compute_sharded_gradient(self.mesh, self.spec, self.inputs, x, cotangent, precision)


@dataclass(frozen=True)
class HeadSharded:
    """Weights of several fused maps, such as `[D 3D]` of queries, keys and values, sharded within each map.

    A shard of `[D 3D]` would hold all queries and some keys. So these weights are sharded along their input, and
    resharded here with one all-to-all of the weights, instead of one of the much larger activations.
    """

    mesh: AnyMesh

    def __call__(self, kernel: Float[Array, "i o"], parts: int) -> Float[Array, "i {parts} n"]:
        kernel = jax.lax.with_sharding_constraint(kernel, NamedSharding(self.mesh, P("tensor", None)))
        maps = kernel.reshape(kernel.shape[0], parts, -1)
        return jax.lax.with_sharding_constraint(maps, NamedSharding(self.mesh, P(None, None, "tensor")))


def _pad_tokens(inputs: AttentionInputs, ranks: int, *, keys: bool) -> AttentionInputs:
    """Pad tokens to a multiple of the ranks, and the keys too if `keys`."""

    def fill(rows, is_padded=True):
        return rows if rows is None or not is_padded else pad_to_blocks(rows, ranks)

    bias = inputs.bias
    if bias is not None:
        positions = fill(bias.q_positions), fill(bias.kv_positions, keys)
        bias = replace(bias, q_positions=positions[0], kv_positions=positions[1])
    return AttentionInputs(
        fill(inputs.q_segments),
        fill(inputs.context_segments, keys),
        fill(inputs.q_indices),
        fill(inputs.context_indices, keys),
        bias,
        inputs.contiguous,
    )


def _make_specs(inputs: AttentionInputs) -> Any:
    """Return specs that replicate token rows, which are small, over `context`, and shard a bias' table by heads."""
    specs = jax.tree.map(lambda _: P(ROW_AXES), inputs._replace(bias=None))
    if inputs.bias is None:
        return specs
    bias = replace(jax.tree.map(lambda _: P(ROW_AXES), inputs.bias), table=P(None, "tensor"))
    return specs._replace(bias=bias)
