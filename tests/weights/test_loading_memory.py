"""What reading a denoiser takes of the host's memory, besides the result."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dit_video.backbones.wan import WanDitConfig
from dit_video.core.trees import map_with_path
from dit_video.families import save_denoiser
from dit_video.nn import get_param_shapes
from support.devices import HANG

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="reads peaks from Linux's /proc"),
]

SHAPE = {
    "channels": 4,
    "context_width": 64,
    "width": 1024,
    "mlp_dim": 4096,
    "layers": 6,
    "heads": 8,
    "time_width": 32,
}
CONFIG = WanDitConfig(**SHAPE)
STACK = CONFIG.layers * CONFIG.width * CONFIG.mlp_dim * 4
"""bytes of the largest parameter, one linear map of all layers"""


def numbers(path, leaf):
    """Of which no two layers have the same; bfloat16 has them all."""
    first = np.arange(1, leaf.shape[0] + 1) if path.startswith("blocks/") else np.ones(1)
    return np.broadcast_to((first % 200).reshape(-1, *[1] * (len(leaf.shape) - 1)), leaf.shape).astype(np.float32)


READ = """
import sys
from pathlib import Path

import jax
import numpy as np

from dit_video.distributed import MeshConfig, make_mesh, shardings
from dit_video.nn import param_shapes
from dit_video.core.trees import flatten
from dit_video.families import load_denoiser
from weights.test_loading_memory import CONFIG, numbers

def resident(name):
    return 1024 * int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])


def read():
    place = lambda path, parameter: parameter.on(layouts[path])
    return jax.block_until_ready(load_denoiser(sys.argv[1], kernels=sys.argv[2], place=place)[1])


layouts = flatten(shardings(param_shapes(CONFIG.make), make_mesh(MeshConfig(data=1, fsdp=-1))))
read()  # compiles what it takes
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
before = resident("VmRSS")
params = flatten(read())
peak = resident("VmHWM")
held = sum(shard.data.nbytes for leaf in params.values() for shard in leaf.addressable_shards)
print(peak - before - held)
for path, leaf in params.items():
    for shard in leaf.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data, np.float32), numbers(path, leaf)[shard.index])
"""


@pytest.mark.parametrize(("devices", "kernels"), [(1, "float32"), (1, "bfloat16"), (8, "float32")])
def test_reading_takes_less_than_one_and_a_fifth_of_the_largest_file(tmp_path, devices, kernels):
    """On CPU the result itself lies in the host's memory and is taken off.

    Pages of files count, so that a reader that maps all of them fails, as does one that holds a parameter of all
    layers beside its place.
    """
    save_denoiser(tmp_path, CONFIG, map_with_path(numbers, get_param_shapes(CONFIG.make)), shard_bytes=60_000_000)
    largest = max(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert 1.2 * largest < STACK
    tests = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "MALLOC_MMAP_THRESHOLD_": "100000",  # what is freed goes back at once
        "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)]),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path), kernels],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    print(f"{int(done.stdout) / largest:.2f} of the largest file")
    assert int(done.stdout) <= 1.2 * largest
