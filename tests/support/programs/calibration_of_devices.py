"""Measure a collective between eight devices, as a calibration does."""

import jax

from dit_video.planning.efficiencies import CalibrationSize, calibrate, measure_gather
from dit_video.planning.roofline import COLLECTIVES, MEMORY

SIZE = CalibrationSize(width=32, mlp_dim=64, head_width=16, tokens=64, dense_tokens=32, copy_bytes=2**16, repeats=2)


def main() -> None:
    """Calibrate eight devices."""
    calibration = calibrate(size=SIZE)
    assert calibration.measured.by_work[COLLECTIVES].share == 1.0
    assert calibration.chip.link_bandwidth != calibration.chip.bandwidth
    assert calibration.measured.by_work[MEMORY].share == 1.0
    # Twice the bytes take about twice as long: the rate does not grow with them.
    assert measure_gather(jax.devices(), SIZE) > 0
    print("done")


if __name__ == "__main__":
    main()
