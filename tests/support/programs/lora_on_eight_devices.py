"""Attach, merge and unload an adapter on meshes of eight devices, and compare with one device."""

import tempfile
from pathlib import Path

import numpy as np

from dit_video.core.trees import flatten
from dit_video.distributed import Parallelism
from support.device_memory import count_bytes
from support.latents import generate_latents
from support.tiny_lora import make_pipeline, write_lora

PARALLELISMS = (Parallelism(data=1, fsdp=8), Parallelism(data=1, fsdp=2, tensor=2, context=2))


def sample(pipeline) -> np.ndarray:
    """Return the latents of two steps."""
    return generate_latents(pipeline, "a red circle", steps=2, guidance=2.0)


def main() -> None:
    """Check both meshes."""
    one = make_pipeline()
    with tempfile.TemporaryDirectory() as temporary:
        file = write_lora(Path(temporary) / "style.safetensors", one)
        plain, expected = sample(one), sample(one.load_lora(file, 0.5))
        assert np.abs(expected - plain).max() > 1e-2
        for parallel in PARALLELISMS:
            start = count_bytes()
            several = make_pipeline(parallel=parallel)
            own = {path: np.array(leaf) for path, leaf in flatten(several.denoiser_params).items()}
            shardings = {path: leaf.sharding for path, leaf in flatten(several.denoiser_params).items()}
            weight_bytes = {device: size - start[device] for device, size in count_bytes().items()}
            attached = several.load_lora(file, 0.5)
            np.testing.assert_allclose(sample(attached), expected, atol=2e-5)
            np.testing.assert_allclose(sample(attached.unload_lora()), plain, atol=2e-5)
            del attached
            merged = several.load_lora(file, 0.5, merge=True)
            for device, size in count_bytes().items():
                assert size - start[device] < 1.2 * weight_bytes[device], (device, size, weight_bytes[device])
            np.testing.assert_allclose(sample(merged), expected, atol=2e-5)
            assert {path: leaf.sharding for path, leaf in flatten(merged.denoiser_params).items()} == shardings
            restored = flatten(merged.unload_lora().denoiser_params)
            for path, leaf in restored.items():
                np.testing.assert_array_equal(leaf, own[path], err_msg=path)
            assert {path: leaf.sharding for path, leaf in restored.items()} == shardings


main()
print("done")
