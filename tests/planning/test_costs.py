import dataclasses
import math

import pytest

from dit_video.distributed import Parallelism, make_abstract_partitioner
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.backbones.mmdit import MMDiTConfig
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.planning import (
    CollectiveTraffic,
    StepSpec,
    compute_min_collective_bytes,
    count_context_weights,
    estimate_step,
    sum_collective_bytes,
)
from dit_video.planning.costs import split_over_slices

SIZES = {"channels": 4, "context_width": 16, "width": 32, "layers": 3, "heads": 2}
KEYS_AND_VALUES = 3 * 2 * 32 * 32


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (DiTConfig(**SIZES), KEYS_AND_VALUES),
        (MMDiTConfig(**SIZES), 0),
        (WanDitConfig(**SIZES, text_length=8, mlp_dim=48), KEYS_AND_VALUES),
        (WanDitConfig(**SIZES, text_length=8, mlp_dim=48, image_width=12), 2 * KEYS_AND_VALUES),
    ],
    ids=["cross", "joint", "wan", "wan with images"],
)
def test_maps_of_a_context_are_keys_and_values_of_attention_to_texts_and_images(config, count):
    assert count_context_weights(config) == count


STEP = StepSpec(
    width=64,
    mlp_dim=256,
    layers=1,
    tokens_per_row=1024,
    rows=1,
    itemsize=2,
    remat="none",
    forward_flops=10**9,
    attention_flops=0,
)
MESH = {"data": 1, "fsdp": 1, "tensor": 1, "context": 2}
STATE = ("parameters", "optimizer", "ema", "other")


def test_kernels_read_keys_and_values_again_for_each_block_of_queries():
    pairs = 1024 * 1024
    one_pass = 1024 // 128 * (2 * 1024 * 64 * 2)  # each block: keys and values of all tokens, in two bytes
    kernel = dataclasses.replace(STEP, attention_flops=4 * pairs * 64, query_block=128, training=False)
    assert kernel.attention_bytes == one_pass
    # In training for the gradients of queries, and of keys and values, too; a repeated forward pass reads again.
    assert dataclasses.replace(kernel, training=True).attention_bytes == 3 * one_pass
    assert dataclasses.replace(kernel, training=True, remat="full").attention_bytes == 4 * one_pass
    assert dataclasses.replace(kernel, query_block=None).attention_bytes == 0

    def traffic(step):
        return estimate_step(step, dict.fromkeys(STATE, 0), 0, MESH)[1].bytes

    assert traffic(kernel) - traffic(dataclasses.replace(kernel, query_block=None)) == one_pass / 2


def test_recomputation_depends_on_the_stored_activations():
    step = dataclasses.replace(
        STEP, attention_flops=4 * 10**8, remat="none"
    )  # of 10**9 operations, 6 * 10**8 with weights
    with_weights, attention = step.forward_flops - step.attention_flops, step.attention_flops
    once = 3 * with_weights + round((1 + 3.5) * attention)
    again = {
        "none": 0,
        "full": with_weights + attention,
        "attention": with_weights,
        "dots_no_batch": attention,
        "dots_attention": 0,
    }
    assert {remat: step.resize(1, remat).executed_flops - once for remat in again} == again
    kept = [
        estimate_step(step.resize(1, remat), dict.fromkeys(STATE, 0), 0, MESH)[0].activations
        for remat in ("full", "attention", "dots_no_batch", "dots_attention", "none")
    ]
    assert kept == sorted(set(kept))
    assert kept[1] - kept[0] == kept[3] - kept[2] == 1024 // 2 * 64 * 2  # a device's tokens, in two bytes


def test_backward_passes_are_counted_as_each_backend_computes_them():
    """Masked pairs are computed by dense attention; gradients of a kernel may recompute the scores once or twice."""
    step = dataclasses.replace(STEP, forward_flops=10**9, attention_flops=10**8)
    ratios = {"splash": 4.5, "cudnn": 3.5, "chunked": 3.5}
    for attention, ratio in ratios.items():
        assert dataclasses.replace(step, attention=attention).executed_attention_flops == ratio * 10**8
    every_pair = 4 * 64 * 1024**2
    dense = dataclasses.replace(step, attention="dense")
    assert dense.executed_attention_flops == 3 * every_pair > 3 * 10**8
    assert dataclasses.replace(dense, training=False).executed_attention_flops == every_pair


def test_accumulation_divides_activations_and_repeats_the_collectives_of_weights():
    state = dict.fromkeys(STATE, 10**6)
    mesh = {"data": 1, "fsdp": 4, "tensor": 1, "context": 1}
    whole = dataclasses.replace(STEP, rows=16, remat="full")
    parts = dataclasses.replace(whole, accumulation=4)
    (memory, work), (less, more) = (estimate_step(step, state, 10**5, mesh) for step in (whole, parts))
    assert less.activations == memory.activations / 4
    assert less.peak < memory.peak
    assert more.flops == work.flops
    gathered = [next(part.bytes for part in each.collectives if part.kind == "all-gather") for each in (work, more)]
    assert gathered[1] == 4 * gathered[0]


@pytest.mark.parametrize("kind", ["all-gather", "all-reduce", "reduce-scatter", "all-to-all"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_traffic_over_slices_adds_up_to_that_of_the_axis(kind, count):
    mesh = {"data": 1, "fsdp": 8, "tensor": 1, "context": 1}
    traffic = CollectiveTraffic(kind, ("fsdp",), 7.0e6, 1)
    parts = split_over_slices(traffic, mesh, {"fsdp": count})
    assert sum(part.bytes for part in parts) == pytest.approx(7.0e6)
    outside = sum(part.bytes for part in parts if part.between_slices)
    values = 8.0e6  # of which a device has an eighth
    expected = values * (count - 1) / (count if kind == "all-to-all" else 8)
    assert outside == pytest.approx(expected)


def test_an_estimate_says_what_crosses_the_slices():
    state = dict.fromkeys(STATE, 10**6)
    mesh, slices = {"data": 2, "fsdp": 4, "tensor": 1, "context": 1}, {"data": 2}
    _, work = estimate_step(dataclasses.replace(STEP, rows=8), state, 10**5, mesh, slices)
    crossing = [part for part in work.collectives if part.between_slices]
    assert [(part.kind, part.axes, part.bytes) for part in crossing] == [("all-reduce", ("data",), 10**6)]


TRAINING = StepSpec(
    width=64,
    mlp_dim=256,
    layers=3,
    tokens_per_row=1024,
    rows=8,
    itemsize=2,
    remat="none",
    forward_flops=1,
    attention_flops=1,
)
LARGE_MESH = {"data": 2, "fsdp": 4, "tensor": 2, "context": 8}


def partition(context_attention, **sizes):
    """Return the partitioner of a large mesh of devices that do not exist, with other sizes of some axes."""
    parallel = Parallelism(**LARGE_MESH | sizes, context_attention=context_attention)
    return make_abstract_partitioner(parallel, math.prod((LARGE_MESH | sizes).values()))


@pytest.mark.parametrize(("remat", "times"), [("full", 2), ("none", 1)])
def test_weights_move_for_every_forward_pass_and_gradients_once(remat, times):
    result = compute_min_collective_bytes(TRAINING.resize(8, remat), 1000, partition("ulysses"))["weights"]
    assert result == 31 / 32 * 1000 / 2 * (2 * times + 4)


def test_weights_move_over_context_where_fsdp_has_one_device():
    partitioner = partition("ring", fsdp=1, tensor=1)
    assert compute_min_collective_bytes(TRAINING, 1000, partitioner)["weights"] == 7 / 8 * 1000 * (2 + 4)


def test_gradients_of_maps_of_a_context_move_over_fsdp_alone_a_part_to_each_device_of_context():
    bounds = [
        compute_min_collective_bytes(TRAINING, 1000, partition("ulysses"), context_weights=size)["weights"]
        for size in (0, 400)
    ]
    assert bounds[0] - bounds[1] == pytest.approx(4 * 400 / 2 * (31 / 32 - 3 / 4 / 8))


@pytest.mark.parametrize(
    ("way", "remat", "of_a_value"),
    [
        ("ulysses", "none", 7 / 8 * 4 * 2 * 2),  # four arrays, two passes, two bytes
        ("ulysses", "full", 7 / 8 * 4 * 3 * 2),
        ("ring", "none", 7 * (2 * 2 + 2 * 2 + 2 * 4)),  # keys and values in both passes, their gradients in float32
        ("ring", "full", 7 * (2 * 2 * 3 + 2 * 4)),
    ],
)
def test_attention_over_context_moves_the_minimum_of_tokens(way, remat, of_a_value):
    values = 3 * (8 * 1024 // (2 * 4 * 8)) * 64 // 2
    assert compute_min_collective_bytes(TRAINING.resize(8, remat), 1000, partition(way))["attention"] == pytest.approx(
        values * of_a_value
    )


def test_axes_of_size_one_move_nothing():
    assert compute_min_collective_bytes(TRAINING, 1000, partition("ring", fsdp=1, tensor=1, context=1)) == {}


def test_collectives_over_fsdp_and_context_are_those_of_weights_except_exchanges_of_tokens():
    moved = [
        CollectiveTraffic("all-to-all", ("context",), 1.0, 1),
        CollectiveTraffic("collective-permute", ("context",), 2.0, 1),
        CollectiveTraffic("all-reduce", ("context",), 4.0, 1),
        CollectiveTraffic("all-gather", ("fsdp", "context"), 8.0, 1),
        CollectiveTraffic("reduce-scatter", ("fsdp",), 16.0, 1),
        CollectiveTraffic("collective-permute", ("part of", "fsdp", "context"), 32.0, 1),
        CollectiveTraffic("all-gather", ("data", "fsdp"), 64.0, 1),
    ]
    assert (sum_collective_bytes("attention", moved), sum_collective_bytes("weights", moved)) == (3.0, 60.0)
