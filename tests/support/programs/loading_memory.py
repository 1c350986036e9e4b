"""Print the peak memory of reading a denoiser, without the result, in bytes; check its values.

The arguments are the folder and the dtype of kernels.
"""

import sys

import jax
import numpy as np

from dit_video.core.trees import flatten
from dit_video.distributed import Parallelism, make_mesh, make_shardings
from dit_video.families import load_denoiser
from dit_video.nn import get_param_shapes
from support.numbered_denoiser import CONFIG, make_numbers
from support.process_memory import read_memory, reset_peak_memory

LAYOUTS = flatten(make_shardings(get_param_shapes(CONFIG.make), make_mesh(Parallelism(data=1, fsdp=-1))))


def place(path: str, parameter):
    """Put a parameter on its devices."""
    return parameter.to_device(LAYOUTS[path])


def read():
    """Read all parameters."""
    return jax.block_until_ready(load_denoiser(sys.argv[1], kernel_dtype=sys.argv[2], place=place)[1])


def main() -> None:
    """Read twice, and measure the second time."""
    read()  # compiles programs
    reset_peak_memory()
    before = read_memory("VmRSS")
    params = flatten(read())
    peak = read_memory("VmHWM")
    result = sum(shard.data.nbytes for leaf in params.values() for shard in leaf.addressable_shards)
    print(peak - before - result)
    for path, leaf in params.items():
        for shard in leaf.addressable_shards:
            expected = make_numbers(path, leaf)[shard.index]
            np.testing.assert_array_equal(np.asarray(shard.data, np.float32), expected)


if __name__ == "__main__":
    main()
