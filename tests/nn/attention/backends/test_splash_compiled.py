"""The kernel for TPU is compiled ahead of time, without a TPU: needs libtpu, which the [tpu] extra brings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.devices import HANG

ROOT = Path(__file__).resolve().parents[4]

# In a process of its own: a test process that has libtpu would look for TPUs from then on.
PROGRAM = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from dit_video.distributed.planner import Topology
from dit_video.nn.attention import CausalFrames, Full, Tokens, make_attention

topology, length, heads, width = sys.argv[1], 8192, 2, int(sys.argv[2])  # in the largest blocks
mesh = Mesh(Topology.parse(topology).devices(), ("data",))
rows = mesh.size

def shape(*axes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((rows, *axes), dtype, sharding=NamedSharding(mesh, P("data")))

for pattern in (Full(), CausalFrames(chunk=2)):
    attention = make_attention("splash", pattern=pattern)

    def of_chip(q, k, v, ids, places):
        return attention(q, k, v, Tokens.among(ids, places))

    over_rows = jax.shard_map(of_chip, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)

    def loss(*given):
        out = over_rows(*given)
        return out.astype(jnp.float32).sum()

    arrays = [shape(length, heads, width)] * 3
    ids, places = shape(length, dtype=jnp.int32), shape(length, 3, dtype=jnp.int32)
    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays, ids, places).lower(lowering_platforms=("tpu",))
    compiled = lowered.compile()
    text = compiled.as_text()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    print(pattern, text.count("tpu_custom_call"), text.count(" sort("), temporary)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "width"), [("v5e:2x2", 64), ("v5e:2x2", 128), ("v5p:2x2x1", 128), ("v6e:2x2", 128)]
)
def test_splash_compiles_for_a_topology(topology, width):
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install -e '.[tpu]'")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", PROGRAM, topology, str(width)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=HANG, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        pattern, kernels, sorts, temporary = line.rsplit(" ", 3)
        assert int(kernels) >= 3, pattern  # forward, and the gradients of queries and of keys and values
        # Whoever has a segment sees itself: nothing is looked up for that.
        assert int(sorts) == 0 or "CausalFrames" in pattern, pattern
        # One row a chip. Its scores alone would take 2 heads × 8192² × 4 bytes = 537 MB.
        assert int(temporary) < 60e6, pattern
