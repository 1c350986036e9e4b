"""Measurement of a machine's devices, here its CPU."""

from types import SimpleNamespace

import jax
import pytest

from dit_video.core.errors import UserError
from dit_video.planning import StepWork, Topology, compute_expected_times, find_efficiencies, read_calibration
from dit_video.planning.calibrate import CalibrationSize, calibrate
from dit_video.planning.efficiencies import MEMORY, PRODUCTS, name_attention_work
from support.devices import check_on_eight_devices

SMALL = CalibrationSize(width=32, mlp_dim=64, head_width=16, tokens=64, dense_tokens=32, copy_bytes=2**12, repeats=2)
MESH = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}


def test_a_cpu_is_measured_and_planned_for(tmp_path):
    lines = []
    calibration = calibrate(jax.devices("cpu")[:1], size=SMALL, report=lines.append)
    attention = {name_attention_work(backend) for backend in ("chunked", "dense")}
    assert set(calibration.measured.by_work) == {PRODUCTS, MEMORY} | attention
    assert len(lines) == 4
    shares = {work: each.share for work, each in calibration.measured.by_work.items()}
    assert shares[MEMORY] == 1.0  # a CPU's peaks are the largest rates that were measured
    assert max(share for work, share in shares.items() if work != MEMORY) == 1.0
    calibration.write(tmp_path)
    read = read_calibration(tmp_path, "cpu")
    assert read == calibration
    chip = read.chip
    work = StepWork(
        flops=2 * chip.flops,
        bytes=0.0,
        collectives=(),
        attention_flops=chip.flops,
        attention="chunked",
    )
    expected = compute_expected_times(work, find_efficiencies(chip, read), Topology(chip, (1,)), MESH)
    seconds = 1 / shares[PRODUCTS] + 1 / shares[name_attention_work("chunked")]
    assert expected.scheduled == pytest.approx(seconds)


@pytest.mark.usefixtures("optimized_compilation")
@pytest.mark.slow
def test_several_devices_measure_what_they_receive_from_each_other():
    check_on_eight_devices("calibration_of_devices.py")


def test_unknown_accelerators_are_refused():
    other = SimpleNamespace(platform="gpu", device_kind="Radeon")
    message = r"device 'Radeon' is invalid: it must be a CPU or one of v4, .* Use one of these"
    with pytest.raises(UserError, match=message):
        calibrate([other], size=SMALL)
