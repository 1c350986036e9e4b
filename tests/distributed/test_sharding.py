import math
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from dit_video.core.errors import UserError
from dit_video.distributed import Parallelism, ShardingRules, make_mesh, make_shardings, shard_batch
from dit_video.distributed.mesh import make_abstract_mesh
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.nn import get_param_shapes
from dit_video.planning import count_argument_bytes
from dit_video.training.state import attach_shardings
from support.devices import HANG, PROGRAMS, check_on_eight_devices, make_environment, run_together


def test_layouts_on_eight_devices_follow_the_rules():
    check_on_eight_devices("sharding_layouts.py")


@pytest.mark.slow
def test_two_processes_give_one_global_batch():
    for output in run_together("global_batches.py", devices=2):
        assert "done" in output, output


def test_one_device_shards_nothing():
    mesh = make_mesh(Parallelism(), jax.devices()[:1])
    leaf = jax.ShapeDtypeStruct((512, 512), np.float32)
    assert make_shardings({"kernel": leaf}, mesh)["kernel"].spec == P()
    batch = (np.ones((3, 2)), {"y": np.zeros(3)})
    placed = shard_batch(batch, mesh)
    assert jax.tree.structure(placed) == jax.tree.structure(batch)


def make_abstract(**sizes: int) -> jax.sharding.AbstractMesh:
    return make_abstract_mesh(Parallelism(**{"data": 1} | sizes), math.prod(sizes.values()))


@pytest.mark.parametrize(
    ("sizes", "shape", "spec"),
    [
        ({"fsdp": 2, "context": 4}, (8, 24), P(None, ("fsdp", "context"))),
        ({"fsdp": 2, "context": 4}, (16, 20), P(("fsdp", "context"), None)),  # 8 does not divide the larger axis
        ({"fsdp": 2, "context": 4}, (6, 12), P(None, "context")),  # 8 divides no axis; 4 shards are more than 2
        ({"fsdp": 4, "context": 2}, (6, 12), P(None, "fsdp")),
        ({"fsdp": 2, "context": 2}, (6, 10), P(None, "fsdp")),  # of two equal ones
        ({"fsdp": 4, "context": 2}, (6, 10), P(None, "context")),
        ({"fsdp": 1, "context": 4}, (8, 24), P(None, "context")),
        ({"fsdp": 4, "context": 1}, (8, 24), P(None, "fsdp")),
        ({"fsdp": 2, "context": 2, "tensor": 2}, (8, 24), P(("fsdp", "context"), "tensor")),
        ({"fsdp": 2, "context": 4}, (7, 9), P()),
    ],
)
def test_a_parameter_is_sharded_over_fsdp_and_context_or_the_larger_that_divides_it(sizes, shape, spec):
    leaf = {"blocks": {"up": {"kernel": jax.ShapeDtypeStruct((3, *shape), np.float32)}}}
    result = make_shardings(leaf, make_abstract(**sizes), ShardingRules(min_size=1))["blocks"]["up"]["kernel"].spec
    assert result == (P(None, *spec) if spec else P())


@pytest.mark.parametrize(("sizes", "rel"), [({"fsdp": 32}, 0.01), ({"fsdp": 16, "tensor": 2}, 0.02)])
def test_every_device_of_context_holds_its_part_of_parameters_moments_and_averages(sizes, rel):
    state = {
        "params": (params := get_param_shapes(WanDitConfig.t2v_14b().make)),
        "opt_state": jax.eval_shape(optax.adamw(1e-3).init, params),
        "ema": params,
        "step": jax.ShapeDtypeStruct((), np.int32),
    }
    whole, part = (
        count_argument_bytes((attach_shardings(state, make_shardings(state, make_abstract(**sizes, context=context))),))
        for context in (1, 8)
    )
    for kind in ("parameters", "optimizer", "ema"):
        assert whole[kind] / part[kind] == pytest.approx(8, rel=rel), kind


def test_rules_that_cannot_apply_are_refused():
    mesh = make_mesh(Parallelism(), jax.devices()[:1])
    leaf = {"bias": jax.ShapeDtypeStruct((8,), np.float32)}
    with pytest.raises(UserError, match="names model; the mesh has data, fsdp, tensor, context"):
        make_shardings(leaf, mesh, ShardingRules(rules=(("bias", ("model",)),)))
    with pytest.raises(UserError, match=r"has 2 axes, bias has 1\. Put a rule for bias before it"):
        make_shardings(leaf, mesh, ShardingRules(rules=(("bias", (None, "fsdp")),)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": ("bias", ("fsdp",))}, r"rules=\('bias', .*Use rules=\(\("),
        ({"rules": (("bias", "fsdp"),)}, r"rules=\(\('bias', 'fsdp'\),\) .*Use rules=\(\("),
        ({"rules": (("(", ("fsdp",)),)}, r"rules='\(' is invalid: it must be a regular expression"),
        ({"stacked_pattern": "("}, r"stacked_pattern='\(' is invalid"),
    ],
)
def test_rules_of_another_form_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        ShardingRules(**options)


# The work of an update is divided over devices, and its values are those of one device


@pytest.mark.usefixtures("optimized_compilation")
@pytest.mark.slow
def test_matrices_and_accumulated_gradients_are_divided_over_devices():
    check_on_eight_devices("divided_updates.py")


@pytest.mark.usefixtures("optimized_compilation")
@pytest.mark.slow
def test_tpus_divide_the_matrices_of_muon():
    pytest.importorskip("libtpu")
    command = [sys.executable, "-P", str(PROGRAMS / "muon_for_tpu.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=make_environment(1), timeout=HANG, check=False)
    assert "done" in done.stdout, done.stderr
