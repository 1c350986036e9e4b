"""The table of chips, and the chips of JAX's devices."""

from dit_video.core.platform.devices import get_peak_flops
from dit_video.planning import CHIPS, find_chip


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
