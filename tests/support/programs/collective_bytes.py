"""Check the bytes that programs on eight devices exchange.

The only argument is `attention`, `rows`, `weights` or `other weights`.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dit_video.distributed import Parallelism, RingAttention, ShardedAttention, make_mesh
from dit_video.distributed.sharding import DEFAULT_RULES
from dit_video.nn import LoraConfig
from dit_video.nn.attention import AttentionInputs, Full
from dit_video.nn.attention.chunked import ChunkedAttention
from dit_video.planning import read_program
from support import mesh_training

WEIGHTS: dict[str, list] = {
    "weights": [(mesh_training.DIT, {"fsdp": 8}), (mesh_training.WAN, {"fsdp": 4, "context": 2})],
    "other weights": [(mesh_training.WAN, {"fsdp": 8}), (mesh_training.DIT, {"fsdp": 4, "context": 2})],
}
"""Models and meshes whose collectives of weights are checked."""


def check_attention() -> None:
    """Check that attention over a context axis exchanges at most a tenth more than it has to."""
    ranks, length, heads, width, size = 8, 512, 8, 16, 4
    # In float32: the backend for CPUs exchanges bfloat16 as that.
    mesh = make_mesh(Parallelism(data=1, context=ranks))
    split = NamedSharding(mesh, P(None, "context"))
    shape = jax.ShapeDtypeStruct((1, length, heads, width), jnp.float32, sharding=split)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=NamedSharding(mesh, P()))
    values = length // ranks * heads * width
    minimum = {
        # q, k, v and the result, and the gradients of each: all but a device's own part of them.
        "ulysses": 8 * (ranks - 1) / ranks * values * size,
        # Keys and values twice, to every device that does not have them; their gradients in float32.
        "ring": (ranks - 1) * (2 * 2 * size + 2 * 4) * values,
    }
    for method, inner in (
        ("ulysses", ChunkedAttention(chunk=64)),
        ("ring", RingAttention("context", ranks, Full(), 64)),
    ):
        attention = ShardedAttention(mesh, inner, method)

        def compute_gradients(q, k, v, d_out, ids, attention=attention):
            inputs = AttentionInputs.self_attention(ids)
            out, back = jax.vjp(lambda q, k, v: attention(q, k, v, inputs), q, k, v)
            return out, back(d_out)

        compiled = jax.jit(compute_gradients, out_shardings=(split, (split,) * 3))
        program = compiled.lower(shape, shape, shape, shape, ids).compile().as_text()
        collectives = read_program(program, dict(mesh.shape)).collectives
        ratio = sum(traffic.bytes for traffic in collectives.values()) / minimum[method]
        print(method, {key: traffic.bytes for key, traffic in collectives.items()}, ratio)
        assert 1 <= ratio <= 1.1, (method, ratio, collectives)


def check_rows() -> None:
    """Check that layers do not gather tokens: they compute each token without the others.

    There are two rows to a device, and a part of each row's tokens. The weights are so small that they are gathered
    over `fsdp` and `context` together: `check_weights` bounds their bytes.
    """
    backbone = dataclasses.replace(mesh_training.DIT, width=48, heads=6, attention="chunked")
    assert 6 * backbone.width**2 < DEFAULT_RULES.min_size
    collectives, _ = mesh_training.read_collectives(Parallelism(data=1, fsdp=4, context=2), backbone)
    gathered = [
        traffic for (kind, axes), traffic in collectives.items() if (kind, axes) == ("all-gather", ("context",))
    ]
    activations = mesh_training.ROWS // 4 * mesh_training.SHAPE.tokens * backbone.width * 4 / 2
    print([(traffic.axes, traffic.bytes, traffic.count) for traffic in gathered], activations)
    assert sum(traffic.bytes for traffic in gathered) < activations, collectives


def sum_gathered(collectives) -> float:
    """Return the bytes of all gathers: large weights are gathered over `context`, then over `fsdp`."""
    return sum(traffic.bytes for (kind, _), traffic in collectives.items() if kind == "all-gather")


def check_weights(kind: str) -> None:
    """Check that weights are gathered once for each pass, and that frozen weights have no gradients to sum."""
    for config, sizes in WEIGHTS[kind]:
        backbone = dataclasses.replace(config, attention="chunked", remat="full")
        mesh = Parallelism(data=1, **sizes)
        collectives, parameters = mesh_training.read_collectives(mesh, backbone)
        once = 7 / 8 * 4 * parameters
        gathered = sum_gathered(collectives) / once
        # Over context alone only tokens are exchanged, and keys' gradients of captions summed.
        sums = [traffic for (kind, axes), traffic in collectives.items() if "reduce" in kind and "fsdp" in axes]
        summed = sum(traffic.bytes for traffic in sums)
        print(sizes, gathered, summed / once)
        assert gathered <= 1.1 * 2  # for the forward and for the backward pass
        assert summed <= 1.1 * 2 * once  # XLA's CPU backend sums them to all devices, which is twice as much
        lora = LoraConfig(rank=1)
        collectives, parameters = mesh_training.read_collectives(mesh, backbone, lora=lora)
        gathered = sum_gathered(collectives) / (7 / 8 * 4 * parameters)
        print(sizes, gathered, "adapted")
        assert gathered <= 1.1 * 2


if __name__ == "__main__":
    if sys.argv[1] in WEIGHTS:
        check_weights(sys.argv[1])
    else:
        {"attention": check_attention, "rows": check_rows}[sys.argv[1]]()
    print("done")
