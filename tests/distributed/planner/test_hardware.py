"""The table of chips, names of topologies, and estimated times."""

import sys

import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.distributed.planner import (
    CHIPS,
    CollectiveTraffic,
    StepWork,
    Topology,
    compute_step_times,
    find_chip,
    get_link_bandwidth,
    get_peak_flops,
)


class Device:
    def __init__(self, kind: str):
        self.device_kind = kind


def test_every_chip_has_its_specifications_and_their_source():
    assert set(CHIPS) == {"v4", "v5e", "v5p", "v6e", "v7x", "a100", "h100", "h200", "b200"}
    for chip in CHIPS.values():
        assert min(chip.flops, chip.memory, chip.bandwidth, chip.link_bandwidth) > 0
        assert chip.source
        assert (chip.hourly_price is None) == (not chip.price_source)


def test_names_of_topologies_are_parsed():
    assert (Topology.parse("v5e:4x4").num_chips, str(Topology.parse("V5p:4x4x8"))) == (16, "v5p:4x4x8")
    assert Topology.parse("tpu7x:2x2x1").chip.name == "v7x"
    assert Topology.parse("h100:16").num_chips == 16


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("v3:4x4", "Use one of v4, v5e"),
        ("v5p:4x4", "v5p:4x4x4"),
        ("v5e:4x4x4", "v5e:4x4"),
        ("h100:2x4", "h100:8"),
        ("v6e:0x4", "3 sizes|2 sizes"),
        ("v6e", "v6e:4x4"),
    ],
)
def test_unknown_topologies_are_refused(text, says):
    with pytest.raises(UserError, match=says):
        Topology.parse(text)


def test_a_missing_libtpu_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(MissingError, match="pip install libtpu"):
        Topology.parse("v5e:4x4").get_devices()


def test_chips_are_found_for_the_devices_of_jax():
    assert find_chip(Device("TPU v5 lite")) == CHIPS["v5e"]
    assert find_chip(Device("TPU v5")) == CHIPS["v5p"]
    assert find_chip(Device("NVIDIA H200")) == CHIPS["h200"]
    assert find_chip(Device("cpu")) is None
    assert get_peak_flops([Device("NVIDIA H100 80GB HBM3")] * 2) == 2 * 989e12
    assert get_peak_flops([Device("cpu")]) is None
    assert get_peak_flops([Device("NVIDIA H100 PCIe")]) is None  # slower than the table's


def test_times_are_those_of_the_slowest_resource():
    topology = Topology.parse("v5e:4x4")
    mesh = {"data": 1, "fsdp": 4, "tensor": 1, "context": 4}
    work = StepWork(
        flops=197e12, bytes=819e9 / 2, collectives=(CollectiveTraffic("all-gather", ("fsdp",), 90e9 / 4, 1),)
    )
    times = compute_step_times(work, topology, mesh)
    assert (times.compute, times.memory, times.collectives) == pytest.approx((1.0, 0.5, 0.25))
    assert (times.overlapped, times.apart) == pytest.approx((1.0, 1.25))


def test_gpus_of_another_domain_are_reached_by_the_network():
    topology, mesh = Topology.parse("h100:32"), {"data": 4, "fsdp": 4, "tensor": 2, "context": 1}
    assert get_link_bandwidth(topology, mesh, ("tensor",)) == get_link_bandwidth(topology, mesh, ("fsdp",)) == 450e9
    assert get_link_bandwidth(topology, mesh, ("data",)) == 50e9
