"""Host memory for reading a denoiser, besides the result."""

import subprocess
import sys
from pathlib import Path

import pytest

from dit_video.core.trees import map_with_path
from dit_video.families import save_denoiser
from dit_video.nn import get_param_shapes
from support.devices import HANG, PROGRAMS, make_environment
from support.numbered_denoiser import CONFIG, make_numbers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="reads peaks from Linux's /proc"),
]

STACK = CONFIG.layers * CONFIG.width * CONFIG.mlp_dim * 4
"""Bytes of the largest parameter, one linear map of all layers."""


@pytest.mark.parametrize(("devices", "kernels"), [(1, "float32"), (1, "bfloat16"), (8, "float32")])
def test_reading_takes_less_than_one_and_a_fifth_of_the_largest_file(tmp_path, devices, kernels):
    """On CPU the result itself is in host memory, and is subtracted.

    Pages of files count, so that a reader that maps all of them fails, as does one that holds a parameter of all
    layers beside its place.
    """
    save_denoiser(tmp_path, CONFIG, map_with_path(make_numbers, get_param_shapes(CONFIG.make)), shard_bytes=60_000_000)
    largest = max(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert 1.2 * largest < STACK
    # A low threshold makes malloc return freed memory at once.
    environment = {**make_environment(devices), "MALLOC_MMAP_THRESHOLD_": "100000"}
    done = subprocess.run(
        [sys.executable, "-P", str(PROGRAMS / "loading_memory.py"), str(tmp_path), kernels],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    print(f"{int(done.stdout) / largest:.2f} of the largest file")
    assert int(done.stdout) <= 1.2 * largest
