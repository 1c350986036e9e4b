"""Attention of a model whose rows, heads and tokens lie on several devices.

Attention is the one place where tokens of a row meet: all else of a transformer is computed for each token alone, and
the compiler divides it as arrays lie. So a denoiser's attention functions are wrapped, its linear maps are told how
weights lie while they are used (`Whole`, `ByHeads`), and nothing else of it knows of devices. Under `jax.shard_map`
each device gets its rows (`data`, `fsdp`), its heads (`tensor`) and its tokens (`context`), and computes with the
model's own backend. How tokens meet over `context`:

- `ulysses` (arXiv 2309.14509): an all-to-all gives every device all tokens of some of its heads, another one takes the
  result back. 8 of them a layer and training step (12 with recomputation), each of `(c - 1) / c` of a device's values.
  Every backend and pattern, and a bias of the scores.
- `ring` (arXiv 2310.01889): see `ring`. Any number of heads, every pattern and a bias; blocks of its own, which are
  those of the backend `chunked`.

Both honour segments. Under `ulysses` the backend skips what a block need not see; a rank of a `ring` computes nothing
with the keys of a rank that has no segment of its own. Cross-attention's keys lie whole on all devices of `context`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from dit_video.backbones.dit import Dit
from dit_video.backbones.wan import WanDit
from dit_video.core.errors import UserError
from dit_video.distributed.mesh import AnyMesh, ContextAttention
from dit_video.distributed.ring import Ring
from dit_video.distributed.sharding_rules import DEFAULT_RULES, FUSED, ROWS
from dit_video.nn import Linear, Make
from dit_video.nn.attention import Attention, Chosen, Pattern, Tokens
from dit_video.nn.attention.api import Keys, Queries
from dit_video.nn.attention.key_ranges import padded

_HEADS = P(ROWS, "context", "tensor", None)
_WHOLE = P(ROWS, None, "tensor", None)


def over_devices(make: Make, mesh: AnyMesh, context_attention: ContextAttention = "ulysses") -> Make:
    """What builds the same denoiser, whose attention all devices of the mesh compute; its parameters are the same.

    Raises:
      UserError: a ring with a backend that is not `auto` or `chunked`; what `make` builds is no denoiser.
    """
    if mesh.size == 1:
        return make

    def made(rngs: nnx.Rngs) -> Dit | WanDit:
        model: Any = make(rngs)
        if not isinstance(model, Dit | WanDit):
            raise UserError(f"attention over devices is a denoiser's, not one of {type(model).__name__}")
        chosen = model.attention
        if mesh.shape["context"] > 1 and context_attention == "ring" and isinstance(chosen, Chosen):
            check_ring(chosen.backend)
        model.attention = SelfAttentions(mesh, chosen, context_attention)
        for stack in (model.blocks, getattr(model, "temporal_blocks", None)):
            stream: Any
            for stream in (stack, *(getattr(stack, name, None) for name in ("video", "context"))):
                if hasattr(stream, "cross"):
                    stream.cross = OverDevices(mesh, stream.cross, "cross")
                if hasattr(stream, "fused") and mesh.shape["tensor"] > 1:
                    stream.fused = ByHeads(mesh)
        if mesh.shape["fsdp"] > 1:
            for path, part in nnx.iter_modules(model):
                if isinstance(part, Linear):
                    part.placed = _whole(mesh, "/".join(map(str, path)))
        return model

    return made


def check_ring(backend: str) -> None:
    """Raises UserError for a backend that a ring would not be computed with."""
    if backend not in ("auto", "chunked"):
        raise UserError(
            f"ring attention computes blocks of its own, those of chunked, not by {backend}; set the denoiser's "
            "attention='chunked', or the mesh's context_attention='ulysses'"
        )


def check_ulysses(heads: int, ranks: int) -> None:
    """Raises UserError for heads, those of one part of `tensor`, that devices along `context` do not divide."""
    if heads % ranks:
        would = [str(size) for size in range(1, heads + 1) if heads % size == 0]
        raise UserError(
            f"ulysses gives each of context={ranks} devices some of {heads} heads, which do not divide; use context="
            f"{' or '.join(would)}, or the mesh's context_attention='ring'"
        )


@dataclass(frozen=True)
class SelfAttentions:
    """The self-attention functions of a model, by pattern."""

    mesh: AnyMesh
    choose: Callable[[Pattern], Attention]
    context_attention: ContextAttention

    def __call__(self, pattern: Pattern) -> Attention:
        ranks = self.mesh.shape["context"]
        if ranks > 1 and self.context_attention == "ring":
            return OverDevices(self.mesh, Ring("context", ranks, pattern), "ring")
        return OverDevices(self.mesh, self.choose(pattern), "ulysses")


@dataclass(frozen=True)
class OverDevices:
    """An attention function on a mesh: `inner` is what each device computes.

    Tokens that the devices of `context` do not divide are filled up with padding.
    """

    mesh: AnyMesh
    inner: Attention
    way: str
    """`ulysses`, `ring`, or `cross`, whose keys lie whole on all devices of `context`"""

    def __call__(self, q: Queries, k: Keys, v: Keys, at: Tokens) -> Queries:
        ranks, length = self.mesh.shape["context"], q.shape[1]
        at = _filled(at, ranks, keys=self.way != "cross")
        q = padded(q, ranks)
        if self.way != "cross":
            k, v = padded(k, ranks), padded(v, ranks)
        keys = _WHOLE if self.way == "cross" else _HEADS
        on_rank = {"ulysses": self._ulysses, "ring": self.inner, "cross": self._cross}[self.way]
        mixed = jax.shard_map(
            on_rank,
            mesh=self.mesh,
            in_specs=(_HEADS, keys, keys, _specs(at)),
            out_specs=_HEADS,
            check_vma=False,
        )(q, k, v, at)
        return mixed[:, :length]

    def _ulysses(self, q: Queries, k: Keys, v: Keys, at: Tokens) -> Queries:
        ranks = self.mesh.shape["context"]
        if ranks == 1:
            return self.inner(q, k, v, at)
        check_ulysses(q.shape[2], ranks)
        q, k, v = (jax.lax.all_to_all(x, "context", split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
        if at.bias is not None:
            first = jax.lax.axis_index("context") * q.shape[2]
            table = jax.lax.dynamic_slice_in_dim(at.bias.table, first, q.shape[2], axis=1)
            at = at._replace(bias=replace(at.bias, table=table))
        mixed = self.inner(q, k, v, at)
        return jax.lax.all_to_all(mixed, "context", split_axis=1, concat_axis=2, tiled=True)

    def _cross(self, q: Queries, k: Keys, v: Keys, at: Tokens) -> Queries:
        first = jax.lax.axis_index("context") * q.shape[1]
        own = jax.lax.dynamic_slice_in_dim(at.q_segments, first, q.shape[1], axis=1)
        return self.inner(q, k, v, at._replace(q_segments=own))


def _whole(mesh: AnyMesh, path: str) -> "Whole | None":
    """How the weights of the module at this path lie while they are used; None where `ByHeads` says so."""
    axis = DEFAULT_RULES.tensor_axis(f"{path}/kernel") if mesh.shape["tensor"] > 1 else None
    if axis is None:
        return Whole(mesh, P())
    if path.endswith(FUSED):
        return None
    return Whole(mesh, P(None, "tensor") if axis == -1 else P("tensor", None))


@dataclass(frozen=True)
class Whole:
    """A weight that `fsdp` splits, gathered before it is used: once for a forward pass, and once for a backward pass.

    Left to itself XLA's partitioner gathers a weight anew for each product that it is in, a layout of its own each
    time, and may gather tokens instead.
    """

    mesh: AnyMesh
    spec: P

    def __call__(self, kernel: Float[Array, "i o"]) -> Float[Array, "i o"]:
        return jax.lax.with_sharding_constraint(kernel, NamedSharding(self.mesh, self.spec))

    def factors(
        self, a: Float[Array, "i r"], b: Float[Array, "r o"]
    ) -> tuple[Float[Array, "i r"], Float[Array, "r o"]]:
        """Of an adapted kernel, to go with it: of a factor in parts the compiler makes all rows' outputs in parts."""
        inputs, outputs = (*self.spec, None, None)[:2]
        layouts = P(inputs, None), P(None, outputs)
        return tuple(
            jax.lax.with_sharding_constraint(factor, NamedSharding(self.mesh, spec))
            for factor, spec in zip((a, b), layouts, strict=True)
        )


@dataclass(frozen=True)
class ByHeads:
    """Weights of several maps in one, such as `[D 3D]` of queries, keys and values, split over `tensor` in each map.

    A part of `[D 3D]` would be all queries and some keys: so such weights lie split along their input, and are laid
    anew by this, with one all-to-all of the weights instead of one of the much larger activations.
    """

    mesh: AnyMesh

    def __call__(self, kernel: Float[Array, "i o"], parts: int) -> Float[Array, "i {parts} n"]:
        kernel = jax.lax.with_sharding_constraint(kernel, NamedSharding(self.mesh, P("tensor", None)))
        apart = kernel.reshape(kernel.shape[0], parts, -1)
        return jax.lax.with_sharding_constraint(apart, NamedSharding(self.mesh, P(None, None, "tensor")))


def _filled(at: Tokens, ranks: int, *, keys: bool) -> Tokens:
    """With padding up to a number of tokens that the ranks divide, for the keys, too."""

    def fill(rows, wanted=True):
        return rows if rows is None or not wanted else padded(rows, ranks)

    bias = at.bias
    if bias is not None:
        places = fill(bias.q_coordinates), fill(bias.kv_coordinates, keys)
        bias = replace(bias, q_coordinates=places[0], kv_coordinates=places[1])
    return Tokens(
        fill(at.q_segments),
        fill(at.context_segments, keys),
        fill(at.q_indices),
        fill(at.context_indices, keys),
        bias,
    )


def _specs(at: Tokens) -> Any:
    """Whole rows for every device of `context`: they are small. A bias' table by heads."""
    specs = jax.tree.map(lambda _: P(ROWS), at._replace(bias=None))
    if at.bias is None:
        return specs
    bias = replace(jax.tree.map(lambda _: P(ROWS), at.bias), table=P(None, "tensor"))
    return specs._replace(bias=bias)
