import pytest

from dit_video.planning import CollectiveTraffic, StepSpec, compute_min_collective_bytes, sum_collective_bytes

STEP = StepSpec(
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
MESH = {"data": 2, "fsdp": 4, "tensor": 2, "context": 8}


@pytest.mark.parametrize(("remat", "times"), [("full", 2), ("none", 1)])
def test_weights_move_for_every_forward_pass_and_gradients_once(remat, times):
    result = compute_min_collective_bytes(STEP.resize(8, remat), 1000, MESH, "ulysses")["weights"]
    assert result == 31 / 32 * 1000 / 2 * (2 * times + 4)


def test_weights_move_over_context_where_fsdp_has_one_device():
    mesh = {"data": 2, "fsdp": 1, "tensor": 1, "context": 8}
    assert compute_min_collective_bytes(STEP, 1000, mesh, "ring")["weights"] == 7 / 8 * 1000 * (2 + 4)


def test_gradients_of_maps_of_a_context_move_over_fsdp_alone_a_part_to_each_device_of_context():
    bounds = [
        compute_min_collective_bytes(STEP, 1000, MESH, "ulysses", context_weights=size)["weights"] for size in (0, 400)
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
    assert compute_min_collective_bytes(STEP.resize(8, remat), 1000, MESH, way)["attention"] == pytest.approx(
        values * of_a_value
    )


def test_axes_of_size_one_move_nothing():
    assert compute_min_collective_bytes(STEP, 1000, {"data": 8, "fsdp": 1, "tensor": 1, "context": 1}, "ring") == {}


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
