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

from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.core.platform.devices import Platform
from dit_video.distributed.mesh import AnyMesh, ContextAttention
from dit_video.distributed.ring import RingAttention
from dit_video.distributed.sharding_rules import DEFAULT_RULES, ROW_AXES, STATE_AXES, choose_kernel_split
from dit_video.distributed.weight_gradients import LayerInputs, compute_sharded_gradient
from dit_video.nn.attention import Attention, AttentionInputs, Backend, Full, Pattern, get_backend_name
from dit_video.nn.attention.api import Keys, Queries
from dit_video.nn.attention.key_ranges import pad_to_blocks
from dit_video.nn.linear import compute_kernel_gradient
from dit_video.nn.parallel import ONE_DEVICE, FusedConstraint, Parallelism, Precision, Split, WeightConstraint

_HEAD_SPEC = P(ROW_AXES, "context", "tensor", None)
_FULL_SPEC = P(ROW_AXES, None, "tensor", None)


def make_parallelism(mesh: AnyMesh, context_attention: ContextAttention = "ulysses") -> Parallelism:
    """Return what a model is made with (`config.make(rngs, parallel)`) to be computed over all devices of a mesh.

    The model's parameters do not depend on it.
    """
    if mesh.size > 1:
        return MeshParallelism(mesh, context_attention)
    if isinstance(mesh, jax.sharding.AbstractMesh) or mesh.devices.flat[0] in jax.devices():
        return ONE_DEVICE
    return DeviceParallelism(mesh.devices.flat[0])


@dataclass(frozen=True)
class DeviceParallelism(Parallelism):
    """A model on one device that JAX does not use by default, such as one that libtpu only describes."""

    device: Any

    @property
    def platform(self) -> Platform:
        return Platform.from_device(self.device)


@dataclass(frozen=True)
class MeshParallelism(Parallelism):
    """Attention over the devices of a mesh, and weights that are gathered or resharded for their use."""

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
        return ShardedAttention(self.mesh, super().make_attention(backend, pattern), "ulysses")

    def make_cross_attention(self, backend: Backend) -> Attention:
        return ShardedAttention(self.mesh, super().make_cross_attention(backend), "cross")

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
            "denoiser's attention='chunked', or the mesh's context_attention='ulysses'."
        )


def check_ulysses(heads: int, ranks: int) -> None:
    """Raise UserError if the devices of `context` do not divide the heads of one shard of `tensor`."""
    if heads % ranks:
        valid = [str(size) for size in range(1, heads + 1) if heads % size == 0]
        raise UserError(
            f"context={ranks} is invalid: ulysses gives each of context={ranks} devices some of {heads} heads, which "
            f"do not divide. Use context={' or '.join(valid)}, or the mesh's context_attention='ring'."
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
