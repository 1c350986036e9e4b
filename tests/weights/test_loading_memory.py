"""What reading a denoiser takes of the host's memory, besides the result."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from devices import HANG
from dit_video.dit import WanDitConfig
from dit_video.nn import param_shapes
from dit_video.weights import save_denoiser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="reads peaks from Linux's /proc"),
]

SHAPE = {
    "channels": 4,
    "context_width": 64,
    "width": 512,
    "hidden_width": 1024,
    "layers": 12,
    "heads": 4,
    "time_width": 32,
}
CONFIG = WanDitConfig(**SHAPE)

READ = f"""
import sys
from pathlib import Path

from dit_video.dit import WanDitConfig
from dit_video.nn import param_shapes
from dit_video.weights import load_denoiser


def resident(name):
    return 1024 * int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])


param_shapes(WanDitConfig(**{SHAPE!r}).make)  # imports and traces what the model needs
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
before = resident("VmRSS")
load_denoiser(sys.argv[1], place=lambda path, array: None)
print(resident("VmHWM") - before)
"""


def test_reading_takes_less_than_one_and_a_fifth_of_the_largest_file(tmp_path):
    """Each parameter is dropped when it is placed: on CPU the result itself would lie in the host's memory.

    Pages of files count, so that a reader that maps all of them fails. The largest parameter, one linear map of all
    layers, is what is held: here 25 MB, a sixth of the model, in Wan's a fifth.
    """
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), param_shapes(CONFIG.make))
    save_denoiser(tmp_path, CONFIG, params, shard_bytes=40_000_000)
    files = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert len(files) > 3
    assert sum(files) > 3 * 1.2 * max(files)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path)], capture_output=True, text=True, check=False, timeout=HANG
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 1.2 * max(files)
