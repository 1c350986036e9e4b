"""Training of a denoiser on meshes: equal to one device, from random gates, with rows of several segments."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from dit_video.core import trees
from dit_video.core.errors import UserError
from dit_video.distributed import (
    MeshPartitioner,
    Parallelism,
    ShardingRules,
    check_denoiser,
    make_abstract_partitioner,
    make_mesh,
    make_partitioner,
    make_shardings,
)
from dit_video.distributed.sharding import DEFAULT_RULES, FUSED_MAPS
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.backbones.mmdit import MMDiTConfig
from dit_video.models.backbones.spatio_temporal import SpatioTemporalDiTConfig
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.nn import ONE_DEVICE, Linear, get_param_shapes
from dit_video.nn.attention import AttentionInputs, Full, SlidingWindow
from dit_video.nn.attention.chunked import attend_part, compute_part_gradients
from dit_video.nn.attention.dense import DenseAttention
from support.devices import check_on_eight_devices, run_together
from support.marks import mark_nightly_except

MESHES = {
    # Every two axes beside each other, and two and four devices of context.
    "all axes": [
        (sizes, "ulysses") for sizes in ((2, 2, 2, 1), (2, 2, 1, 2), (2, 1, 2, 2), (1, 2, 2, 2), (1, 2, 1, 4))
    ],
    # Every number of devices in the ring, beside each other axis.
    "ring": [(sizes, "ring") for sizes in ((1, 1, 1, 8), (1, 1, 2, 4), (2, 2, 1, 2))],
    # Every two axes beside each other except the first and the last.
    "some": [((2, 2, 2, 1), "ulysses"), ((1, 2, 2, 2), "ulysses"), ((1, 1, 4, 2), "ring")],
}
"""Meshes of eight devices, in groups, each of which is one program that trains on one device once."""
_ALL = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(sizes, axis=0) == 8]
OTHER_MESHES = {
    "all axes": [(sizes, "ulysses") for sizes in _ALL if (sizes, "ulysses") not in MESHES["all axes"]],
    "ring": [(sizes, "ring") for sizes in _ALL if sizes[3] > 1 and (sizes, "ring") not in MESHES["ring"]],
    "some": [((2, 1, 1, 4), "ulysses")],
}
"""The other meshes with the same methods."""
OPTIMIZERS = {"all axes": "sgd", "ring": "sgd", "some": "adamw"}
"""All gradients are compared under SGD."""


@pytest.mark.slow
def test_attention_over_devices_is_that_of_one():
    check_on_eight_devices("context_parallel_attention.py")


@pytest.mark.slow
def test_context_parallel_attention_exchanges_no_more_than_it_has_to():
    check_on_eight_devices("collective_bytes.py", "attention")


@pytest.mark.nightly  # other tests count the gathers of programs for TPUs
def test_weights_are_gathered_once_in_each_pass():
    check_on_eight_devices("collective_bytes.py", "weights")


@pytest.mark.nightly
def test_weights_of_other_models_and_meshes_are_gathered_once_in_each_pass():
    check_on_eight_devices("collective_bytes.py", "other weights")


@pytest.mark.slow
def test_gradients_of_weights_over_fsdp_and_context_are_those_of_one_device():
    check_on_eight_devices("weight_gradients.py")


@pytest.mark.slow
def test_tpus_gather_weights_in_bfloat16_and_scatter_gradients_in_float32_over_fsdp_and_context():
    """This takes a process of its own: one that has libtpu would look for TPUs from then on."""
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install -e '.[tpu]'")
    check_on_eight_devices("weight_collectives_for_tpu.py")


@pytest.mark.slow
def test_tokens_stay_on_their_device_outside_attention():
    check_on_eight_devices("collective_bytes.py", "rows")


@pytest.mark.slow
@pytest.mark.parametrize("group", mark_nightly_except(("some",), MESHES))
def test_meshes_of_eight_devices_train_as_one_device(group):
    check_on_eight_devices("mesh_training_runs.py", "backbone", str(MESHES[group]), OPTIMIZERS[group])


@pytest.mark.nightly
@pytest.mark.parametrize("group", OTHER_MESHES)
def test_all_other_meshes_of_eight_devices_train_as_one_device(group):
    check_on_eight_devices("mesh_training_runs.py", "backbone", str(OTHER_MESHES[group]), OPTIMIZERS[group])


@pytest.mark.slow
def test_wan_trains_on_meshes_as_on_one_device():
    check_on_eight_devices(
        "mesh_training_runs.py", "wan", str([((1, 1, 4, 2), "ulysses"), ((1, 2, 2, 2), "ring")]), "sgd"
    )


@pytest.mark.parametrize(
    ("backbone", "meshes"),
    [
        pytest.param("backbone", [((1, 2, 1, 4), "ulysses"), ((1, 2, 2, 2), "ring")], marks=pytest.mark.slow),
        pytest.param("wan", [((1, 2, 2, 2), "ring"), ((1, 2, 1, 4), "ulysses")], marks=pytest.mark.nightly),
    ],
)
def test_gradients_that_are_summed_as_on_accelerators_are_those_of_one_device(backbone, meshes):
    check_on_eight_devices("mesh_training_runs.py", f"{backbone} accelerator", str(meshes), "sgd")


@pytest.mark.slow
def test_context_may_span_two_processes():
    for output in run_together("context_parallel_training.py", devices=4):
        assert "done" in output, output


@pytest.mark.slow
def test_gradients_of_two_parts_of_the_keys_add_up_to_those_of_all():
    draw = np.random.default_rng(1)
    q, k, v, d_out = (jnp.asarray(draw.normal(size=(1, 12, 2, 4)), jnp.float32) for _ in range(4))
    segments = jnp.asarray([[1] * 5 + [2] * 6 + [0]], jnp.int32)
    inputs = AttentionInputs.self_attention(segments)
    expected, back = jax.vjp(lambda q, k, v: DenseAttention()(q, k, v, inputs), q, k, v)
    out, lse = attend_part(q, k, v, inputs, pattern=Full(), chunk=5)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    residuals = {"lse": lse, "delta": jnp.moveaxis((out * d_out).sum(-1), 2, 1), "d_out": d_out}
    halves = [
        compute_part_gradients(
            q,
            k[:, part],
            v[:, part],
            AttentionInputs(segments, segments[:, part]),
            pattern=Full(),
            chunk=5,
            **residuals,
        )
        for part in (slice(0, 7), slice(7, 12))
    ]
    d_q, d_k, d_v = back(d_out)
    np.testing.assert_allclose(halves[0][0] + halves[1][0], d_q, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([half[1] for half in halves], axis=1), d_k, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([half[2] for half in halves], axis=1), d_v, atol=1e-5)


MESH = jax.sharding.AbstractMesh((1, 2, 4, 4), ("data", "fsdp", "tensor", "context"))
STATE = ("fsdp", "context")
FITS = {"rows": 4, "tokens": 64}
SIZE = {"channels": 1, "context_width": 8, "width": 64, "heads": 8}


@pytest.mark.parametrize(
    ("fields", "batch", "way", "message"),
    [
        ({}, {"rows": 3}, "ring", "a batch has 3 rows, which data x fsdp=2 .* do not divide. .* of 1, 3, or 4 rows"),
        ({"heads": 6, "width": 96}, {}, "ring", "6 heads, which tensor=4 .* of 1, 2, 3, 6, or 8 heads"),
        ({"mlp_ratio": 0.65625}, {}, "ring", "42 hidden values, which tensor=4"),
        ({}, {"tokens": 66}, "ring", "66 tokens, which context=4 .* or 68 tokens"),
        ({}, {}, "ulysses", "context=4 devices some of 2 heads.*Use context=1 or 2, or .*'ring'"),
        ({"attention": "splash"}, {}, "ring", "attention='splash' is invalid: .* attention='chunked'"),
    ],
)
def test_a_batch_or_model_that_does_not_fit_a_mesh_is_refused_with_values_that_fit(fields, batch, way, message):
    backbone = DiTConfig(**{"channels": 1, "context_width": 8, "width": 64, "heads": 8} | fields)
    with pytest.raises(UserError, match=message):
        check_denoiser(MeshPartitioner(MESH, way), backbone, **FITS | batch)


def test_a_batch_and_model_that_fit_a_mesh_are_accepted():
    backbone = DiTConfig(channels=1, context_width=8, width=64, heads=8, pattern=SlidingWindow(radius=(1, None, None)))
    check_denoiser(MeshPartitioner(MESH, "ring"), backbone, **FITS)
    wan = WanDitConfig(width=128, mlp_dim=64, heads=16)
    check_denoiser(MeshPartitioner(MESH, "ulysses"), wan, **FITS)


def test_heads_and_hidden_widths_are_split_over_tensor_as_are_their_moments():
    fits = ShardingRules(min_size=1)
    backbone = DiTConfig(channels=1, context_width=8, width=64, heads=8, layers=2)
    shapes = jax.eval_shape(optax.adam(1e-3).init, get_param_shapes(backbone.make))
    moments = trees.flatten(make_shardings(shapes, MESH, fits))
    expected = {
        "blocks/qkv/kernel": P(None, "tensor", STATE),  # split by heads where it is used
        "blocks/cross_query/kernel": P(None, STATE, "tensor"),
        "blocks/cross_query/bias": P(None, "tensor"),
        "blocks/out/kernel": P(None, "tensor", STATE),
        "blocks/up/kernel": P(None, STATE, "tensor"),
        "blocks/down/kernel": P(None, "tensor", STATE),
    }
    assert {path: moments[f"0/mu/{path}"].spec for path in expected} == expected
    wan = trees.flatten(make_shardings(get_param_shapes(WanDitConfig(width=64, heads=8).make), MESH, fits))
    assert wan["blocks/query/kernel"].spec == wan["blocks/cross_value/kernel"].spec == P(None, STATE, "tensor")
    assert wan["blocks/cross_out/kernel"].spec == P(None, "tensor", STATE)


@pytest.mark.parametrize(
    "backbone",
    [
        SpatioTemporalDiTConfig(channels=1, context_width=8, width=64, heads=8, mlp="swiglu"),
        MMDiTConfig(channels=1, context_width=8, width=64, heads=8),
        WanDitConfig(width=64, heads=8, image_width=8),
    ],
    ids=["cross", "joint", "wan"],
)
def test_layers_are_made_with_the_sharding_that_the_rules_give_their_weights(backbone):
    model = nnx.eval_shape(lambda: backbone.make(nnx.Rngs(0), MeshPartitioner(MESH, "ulysses")))
    layers = {"/".join(map(str, path)): part for path, part in nnx.iter_modules(model) if isinstance(part, Linear)}
    assert len(layers) > 10
    for path, layer in layers.items():
        axis, is_fused = DEFAULT_RULES.get_tensor_axis(f"{path}/kernel"), path.endswith(FUSED_MAPS)
        assert (layer.fused_constraint is not None) == is_fused, path
        spec = {None: P(), -1: P(None, "tensor"), -2: P("tensor", None)}[axis]
        assert (layer.weight_constraint is None) == is_fused, path
        assert is_fused or layer.weight_constraint.spec == spec, path


@pytest.mark.parametrize("sizes", [(1, 4, 1, 1), (1, 2, 1, 4), (2, 1, 1, 4)])
def test_layers_gather_weights_where_fsdp_or_context_shards_them(sizes):
    partitioner = MeshPartitioner(jax.sharding.AbstractMesh(sizes, MESH.axis_names), "ulysses")
    layer = nnx.eval_shape(lambda: Linear(8, 8, partitioner=partitioner, rngs=nnx.Rngs(0)))
    assert layer.weight_constraint.spec == P()


@pytest.mark.parametrize("sizes", [(4, 1, 1, 1), (1, 1, 4, 1)])
def test_layers_use_weights_as_they_are_where_neither_fsdp_nor_context_shards_them(sizes):
    partitioner = MeshPartitioner(jax.sharding.AbstractMesh(sizes, MESH.axis_names), "ulysses")
    layer = nnx.eval_shape(lambda: Linear(8, 8, partitioner=partitioner, rngs=nnx.Rngs(0)))
    assert layer.weight_constraint is None


def test_a_mesh_of_one_device_computes_with_the_model_as_it_is():
    parts = [
        (
            partitioner.platform,
            partitioner.make_attention("auto"),
            partitioner.make_cross_attention("auto"),
            partitioner.make_weight_constraint("outputs"),
            partitioner.make_fused_constraint(),
        )
        for partitioner in (ONE_DEVICE, make_partitioner(Parallelism(), jax.devices()[:1]))
    ]
    assert parts[0] == parts[1]


def test_a_partitioner_has_the_mesh_and_the_method_of_its_parallelism():
    ring = Parallelism(data=len(jax.devices()), context_attention="ring")
    assert make_partitioner(ring) == MeshPartitioner(make_mesh(ring), "ring")
    assert make_abstract_partitioner(Parallelism(data=1, context=4), 4).context_attention == "ulysses"
