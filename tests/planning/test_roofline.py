"""Limits of a step's time, and times that are expected from measured shares of the peak rates."""

import pytest

from dit_video.planning import (
    CollectiveTraffic,
    Efficiencies,
    Efficiency,
    StepWork,
    Topology,
    compute_expected_times,
    compute_step_times,
    find_efficiencies,
    get_link_bandwidth,
)

V5E = Topology.parse("v5e:4x4")
MESH = {"data": 1, "fsdp": 4, "tensor": 1, "context": 4}
GATHER = CollectiveTraffic("all-gather", ("fsdp",), 90e9 / 4, 1)


def make_efficiencies(**shares: float) -> Efficiencies:
    names = {name.replace("_", " "): share for name, share in shares.items()}
    return Efficiencies(by_work={name: Efficiency(share=share, source="a test") for name, share in names.items()})


def test_limits_are_those_of_the_slowest_resource():
    times = compute_step_times(StepWork(flops=197e12, bytes=819e9 / 2, collectives=(GATHER,)), V5E, MESH)
    assert (times.compute, times.memory, times.collectives) == pytest.approx((1.0, 0.5, 0.25))
    assert (times.overlapped, times.apart, times.scheduled) == pytest.approx((1.0, 1.25, 1.0))


def test_gpus_of_another_domain_are_reached_by_the_network():
    topology, mesh = Topology.parse("h100:32"), {"data": 4, "fsdp": 4, "tensor": 2, "context": 1}
    assert get_link_bandwidth(topology, mesh, ("tensor",)) == get_link_bandwidth(topology, mesh, ("fsdp",)) == 450e9
    assert get_link_bandwidth(topology, mesh, ("data",)) == 50e9


def test_traffic_between_slices_takes_the_network():
    topology = Topology.parse("v5e:4x4*2")
    crossing = CollectiveTraffic("all-reduce", ("data",), 3.125e9, 1, between_slices=True)
    times = compute_step_times(
        StepWork(flops=0.0, bytes=0.0, collectives=(GATHER, crossing)), topology, {**MESH, "data": 2}
    )
    assert times.collectives == pytest.approx(1.25)


def test_each_kind_of_work_is_expected_at_its_own_share_of_the_peak():
    exchange = CollectiveTraffic("all-to-all", ("context",), 90e9 / 8, 1)
    work = StepWork(
        flops=197e12,
        bytes=819e9 / 2,
        collectives=(GATHER, exchange),
        attention_flops=0.25 * 197e12,
        attention="splash",
    )
    efficiencies = make_efficiencies(products=0.5, splash_attention=0.25, memory=0.8, collectives=0.5)
    times = compute_expected_times(work, efficiencies, V5E, MESH)
    assert times is not None
    assert (times.compute, times.memory, times.collectives) == pytest.approx((0.75 / 0.5 + 1.0, 0.625, 0.75))
    # The gather overlaps with the products, the exchange does not.
    assert times.scheduled == pytest.approx(2.5 + 0.25)
    at_peak = compute_expected_times(work, make_efficiencies(products=0.5, splash_attention=0.25), V5E, MESH)
    assert (at_peak.memory, at_peak.collectives) == pytest.approx((0.5, 0.375))


@pytest.mark.parametrize(
    "shares", [{}, {"products": 0.5}, {"splash_attention": 0.5}, {"products": 0.5, "chunked_attention": 0.01}]
)
def test_nothing_is_expected_of_work_whose_speed_is_unknown(shares):
    work = StepWork(flops=2e12, bytes=0.0, collectives=(), attention_flops=1e12, attention="splash")
    assert compute_expected_times(work, make_efficiencies(**shares), V5E, MESH) is None


def test_chunked_attention_is_not_expected_at_the_speed_of_a_kernel():
    work = StepWork(flops=2e12, bytes=0.0, collectives=(), attention_flops=1e12, attention="chunked")
    for chip in ("v5p:2x2x1", "h100:8"):
        topology = Topology.parse(chip)
        assert compute_expected_times(work, find_efficiencies(topology.chip), topology, MESH) is None
    dense = StepWork(flops=2e12, bytes=0.0, collectives=(), attention_flops=1e12, attention="dense")
    h100 = Topology.parse("h100:8")
    expected = compute_expected_times(dense, find_efficiencies(h100.chip), h100, MESH)
    assert expected.compute > 4 * compute_step_times(dense, h100, MESH).compute


def test_the_published_training_of_wan_14b_is_expected_to_take_what_it_took():
    """Four chips of a v5p recompute all: 19,573 TFLOP of the model in 36.008 s, which is 29.6 % of the peak."""
    products, attention = 5_431.9e12 * 4 / 3, 14_141.2e12 * 5.5 / 3
    work = StepWork(
        flops=(products + attention) / 4,
        bytes=0.0,
        collectives=(),
        attention_flops=attention / 4,
        attention="splash",
    )
    v5p = Topology.parse("v5p:2x2x1")
    expected = compute_expected_times(work, find_efficiencies(v5p.chip), v5p, MESH).scheduled
    assert expected == pytest.approx(36.008, rel=0.01)
    assert 19_573e12 / (expected * 4 * 459e12) == pytest.approx(0.296, abs=0.003)
    limit = compute_step_times(work, v5p, MESH).apart
    assert 19_573e12 / (limit * 4 * 459e12) > 0.5
