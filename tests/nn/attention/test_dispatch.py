"""`auto` attention is resolved by platform, pattern and capability, in one function."""

import jax.numpy as jnp
import pytest

from dit_video.core.platform.devices import Platform, get_default_platform
from dit_video.nn.attention import CausalFrames, Full, SlidingWindow, SpaceOnly, choose_backend

CPU, TPU = Platform(), Platform("tpu")
A100, H100, OTHER_GPU = Platform("gpu", (8, 0)), Platform("gpu", (9, 0)), Platform("gpu")
WINDOW = SlidingWindow(radius=(1, 1, 1))
LONG = {"queries": 4096, "keys": 4096, "head_width": 128, "dtype": jnp.bfloat16, "segment_count": 8}


@pytest.mark.parametrize(
    ("platform", "pattern", "changes", "backend"),
    [
        (CPU, Full(), {}, "chunked"),
        (CPU, Full(), {"queries": 1024, "keys": 1024}, "dense"),
        (TPU, Full(), {}, "splash"),
        (TPU, CausalFrames(), {}, "splash"),
        (TPU, SpaceOnly(), {"segment_count": None, "dtype": jnp.float32}, "splash"),
        (TPU, WINDOW, {}, "chunked"),
        (TPU, Full(), {"biased": True}, "chunked"),
        (TPU, Full(), {"queries": 1024, "keys": 1024}, "dense"),
        (TPU, Full(), {"keys": 512}, "splash"),
        (H100, Full(), {}, "cudnn"),
        (H100, Full(), {"head_width": 256}, "cudnn"),
        (H100, Full(), {"head_width": 100}, "chunked"),
        (H100, Full(), {"head_width": 512}, "chunked"),
        (H100, Full(), {"dtype": jnp.float32}, "chunked"),
        (H100, Full(), {"segment_count": None}, "chunked"),
        (H100, Full(), {"biased": True}, "chunked"),
        (H100, CausalFrames(), {}, "chunked"),
        (A100, Full(), {}, "chunked"),
        (A100, Full(), {"segment_count": 1}, "cudnn"),
        (A100, Full(), {"segment_count": 1, "head_width": 256}, "chunked"),
        (OTHER_GPU, Full(), {"segment_count": 1}, "chunked"),
    ],
)
def test_auto_takes_the_kernel_that_skips_pairs_of_two_clips(platform, pattern, changes, backend):
    assert choose_backend(platform, pattern, **{**LONG, **changes}) == backend


def test_a_platform_is_read_from_a_device():
    class Device:
        platform, compute_capability = "gpu", "9.0"

    class RocmDevice:
        platform, compute_capability = "gpu", "gfx942"

    assert Platform.from_device(Device()) == H100
    assert Platform.from_device(RocmDevice()) == OTHER_GPU
    assert get_default_platform() == CPU
