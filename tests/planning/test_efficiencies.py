"""Published and measured shares of the chips' peak rates, and the files of the latter."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import pytest

from dit_video.core.errors import UserError
from dit_video.planning import (
    CHIPS,
    Calibration,
    Chip,
    Efficiencies,
    Efficiency,
    StepWork,
    Topology,
    compute_expected_times,
    find_efficiencies,
    get_calibration_folder,
    read_calibration,
)
from dit_video.planning.efficiencies import PUBLISHED_EFFICIENCIES, CalibrationSize, calibrate
from dit_video.planning.roofline import MEMORY, PRODUCTS, name_attention_work
from support.devices import check_on_eight_devices

CPU = Chip(name="cpu", kind="cpu", flops=1e11, memory=2**34, bandwidth=1e10, link_bandwidth=1e9, source="measured")
SPLASH = name_attention_work("splash")
SMALL = CalibrationSize(width=32, mlp_dim=64, head_width=16, tokens=64, dense_tokens=32, copy_bytes=2**12, repeats=2)
MESH = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}


def test_every_published_share_names_its_source():
    assert set(PUBLISHED_EFFICIENCIES) == set(CHIPS)
    listed = [each for efficiencies in PUBLISHED_EFFICIENCIES.values() for each in efficiencies.by_work.values()]
    assert listed
    for efficiency in listed:
        assert 0 < efficiency.share < 1
        assert "github.com/" in efficiency.source or "arXiv" in efficiency.source


def test_what_nobody_published_is_left_out():
    assert find_efficiencies(CHIPS["v7x"]).by_work == {}
    assert find_efficiencies(CHIPS["v6e"]).get_share(SPLASH) is None
    for chip in CHIPS.values():
        assert find_efficiencies(chip).get_share(name_attention_work("chunked")) is None
        assert find_efficiencies(chip).get_share(MEMORY) is None


def test_measured_shares_take_the_place_of_published_ones():
    measured = Efficiencies(by_work={PRODUCTS: Efficiency(share=0.6, source="here")})
    efficiencies = find_efficiencies(CHIPS["v5p"], Calibration(chip=CHIPS["v5p"], measured=measured))
    assert efficiencies.get_share(PRODUCTS) == 0.6
    assert efficiencies.get_share(SPLASH) == PUBLISHED_EFFICIENCIES["v5p"].get_share(SPLASH)


@pytest.mark.parametrize("chip", [CPU, CHIPS["v5p"]], ids=lambda chip: chip.name)
def test_a_calibration_is_read_as_it_was_written(tmp_path, chip):
    measured = Efficiencies(by_work={SPLASH: Efficiency(share=0.5, source="here")})
    calibration = Calibration(chip=chip, measured=measured)
    assert read_calibration(tmp_path / "new", chip.name) is None
    path = calibration.write(tmp_path / "new")
    assert read_calibration(tmp_path / "new", chip.name) == calibration
    again = dataclasses.replace(measured, by_work={PRODUCTS: Efficiency(share=0.4, source="later")})
    assert Calibration(chip=chip, measured=again).write(tmp_path / "new") == path
    assert read_calibration(tmp_path / "new", chip.name).measured == again


@pytest.mark.parametrize(
    "document",
    [
        "[]",
        "{}",
        '{"efficiencies": {"products": 1}}',
        '{"efficiencies": {"products": {"share": 0.5}}}',
        '{"efficiencies": {"products": {"share": 0.0, "source": ""}}}',
        '{"efficiencies": {"products": {"share": "half", "source": ""}}}',
    ],
)
def test_a_file_that_is_no_calibration_is_refused(tmp_path, document):
    (tmp_path / "v5p.json").write_text(document)
    message = r"v5p\.json is invalid: it must be a calibration .* use tools/plan\.py --calibrate"
    with pytest.raises(UserError, match=message):
        read_calibration(tmp_path, "v5p")
    (tmp_path / "cpu.json").write_text(json.dumps({"efficiencies": {}}))
    with pytest.raises(UserError, match=r"cpu\.json is invalid"):
        read_calibration(tmp_path, "cpu")


def test_calibrations_lie_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert get_calibration_folder() == tmp_path / "dit_video" / "calibration"


@pytest.mark.nightly
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
