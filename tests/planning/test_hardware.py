"""The table of chips, and the chips of JAX's devices."""

import dataclasses
import sys

import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.core.platform.chips import get_peak_flops
from dit_video.planning import CHIPS, Topology, find_chip
from support.devices import check_on_eight_devices


class Device:
    def __init__(self, kind: str):
        self.device_kind = kind


def test_every_chip_has_its_specifications_and_their_source():
    assert set(CHIPS) == {"v4", "v5e", "v5p", "v6e", "v7x", "a100", "h100", "h200", "b200"}
    for chip in CHIPS.values():
        assert min(chip.flops, chip.memory, chip.bandwidth, chip.link_bandwidth, chip.network_bandwidth) > 0
        assert chip.network_bandwidth < chip.link_bandwidth
        assert chip.source
        assert (chip.hourly_price is None) == (not chip.price_source)


def test_chips_are_found_for_the_devices_of_jax():
    assert find_chip(Device("TPU v5 lite")) == CHIPS["v5e"]
    assert find_chip(Device("TPU v5")) == CHIPS["v5p"]
    assert find_chip(Device("NVIDIA H200")) == CHIPS["h200"]
    assert find_chip(Device("cpu")) is None


def test_the_peaks_of_the_trainer_are_those_of_the_table():
    for chip in CHIPS.values():
        devices_per_chip = 2 if chip.name == "v7x" else 1
        for kind in chip.device_kinds:
            assert get_peak_flops([Device(kind)] * devices_per_chip) == chip.flops
    assert get_peak_flops([Device("NVIDIA H100 80GB HBM3")] * 2) == 2 * 989e12
    assert get_peak_flops([Device("cpu")]) is None
    assert get_peak_flops([Device("NVIDIA H100 PCIe")]) is None  # slower than the table's


def test_a_program_can_use_the_part_of_a_gpu_that_jax_reserves():
    assert CHIPS["h100"].usable_memory == int(0.9 * CHIPS["h100"].memory)
    assert CHIPS["v5p"].usable_memory == CHIPS["v5p"].memory


def test_names_of_topologies_are_parsed():
    assert (Topology.parse("v5e:4x4").num_chips, str(Topology.parse("V5p:4x4x8"))) == (16, "v5p:4x4x8")
    assert Topology.parse("tpu7x:2x2x1").chip.name == "v7x"
    assert Topology.parse("h100:16").num_chips == 16


def test_several_slices_are_named_by_their_number():
    topology = Topology.parse("v5p:4x4x8*2")
    assert (topology.shape, topology.slices, topology.num_chips) == ((4, 4, 8), 2, 256)
    assert str(topology) == "v5p:4x4x8*2"
    assert Topology.parse("v5e:2x2*1") == Topology.parse("v5e:2x2")


def test_chips_that_are_not_in_the_table_can_be_added():
    chips = {**CHIPS, "cpu": dataclasses.replace(CHIPS["h100"], name="cpu", kind="cpu")}
    assert Topology.parse("cpu:2", chips).num_chips == 2
    with pytest.raises(UserError, match="chip 'cpu' is not supported"):
        Topology.parse("cpu:2")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("v3:4x4", "Use one of v4, v5e"),
        ("v5p:4x4", "v5p:4x4x4"),
        ("v5e:4x4x4", "v5e:4x4"),
        ("h100:2x4", "h100:8"),
        ("v6e:0x4", "2 sizes"),
        ("v6e", "v6e:4x4"),
        ("v5e:4x4*0", r"an integer of at least 1\. Use, for two slices, v5e:4x4\*2"),
        ("v5e:4x4*", r"'v5e:4x4\*' is not a topology: .* v5e:4x4\*2"),
        ("v5e:4x4*2*2", r"v5e:4x4\*2$"),
        ("v5e:4x4*-1", r"v5e:4x4\*2$"),
        ("h100:8*2", r"only TPUs come in slices, h100 are counted in all\. Use their number, such as h100:8"),
    ],
)
def test_unknown_topologies_are_refused(text, says):
    with pytest.raises(UserError, match=says):
        Topology.parse(text)


def test_a_missing_libtpu_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(MissingError, match="pip install libtpu"):
        Topology.parse("v5e:4x4").get_devices()


@pytest.mark.usefixtures("optimized_compilation")
@pytest.mark.slow
def test_programs_of_several_slices_move_what_is_computed_by_hand():
    """This takes a process of its own: one that has libtpu would look for TPUs from then on."""
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install -e '.[tpu]'")
    check_on_eight_devices("slice_traffic.py")
