"""Name one of eight devices of this process that is slow."""

import contextlib
import io
import socket

import jax

from dit_video.training.hooks.slow_hosts import DeviceProbe, SlowHostConfig, SlowHostMonitor
from dit_video.training.time_recorder import TimeRecorder


class ThrottledProbe(DeviceProbe):
    """A probe of which one device takes three times as long."""

    def measure(self) -> list[float]:
        return [each * (3 if number == 5 else 1) for number, each in enumerate(super().measure())]


def main() -> None:
    """Compare the devices until one is named, and check that none is without it."""
    assert jax.local_device_count() == 8
    for probe, expected in ((ThrottledProbe(), "its device 5 takes"), (DeviceProbe(), "")):
        monitor, printed = (
            SlowHostMonitor(TimeRecorder(), config=SlowHostConfig(budget=1e9), probe=probe),
            io.StringIO(),
        )
        monitor.resume(0)
        with contextlib.redirect_stderr(printed):
            for step in range(10):
                monitor.on_step(step, None, {})
                values = monitor.derive({"host_seconds": 0.01, "step_seconds": 0.01})
        assert set(values) == {"probe_microseconds_median", "probe_microseconds_max"}
        assert expected in printed.getvalue()
        assert printed.getvalue().count(f"process 0 ({socket.gethostname()})") == bool(expected)
    print("done")


if __name__ == "__main__":
    main()
