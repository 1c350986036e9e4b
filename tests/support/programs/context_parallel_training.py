"""Compare a denoiser's training on a mesh whose context axis spans two processes with that on one device.

The throughput that the processes log is compared, too, on this mesh and on others.
"""

import jax
import numpy as np

from dit_video.distributed import Parallelism, RowPart, make_mesh
from dit_video.training.hooks.throughput import ThroughputMeter
from support import mesh_training
from support.devices import join_processes


def measure_throughput(batch, mesh=None) -> dict[str, float]:
    """Return what is logged of a step of two seconds with this batch, on the mesh or on one process with 8 devices."""
    peak = lambda devices: 1e9 * (8 if mesh is None else len(devices))  # noqa: E731
    meter = ThroughputMeter(lambda batch: 1e6 * float((batch.segments > 0).sum()), peak_flops_fn=peak, mesh=mesh)
    meter.add(batch)
    return meter.derive({"step_seconds": 2.0})


def check_throughput() -> None:
    """Check that processes which share rows, or parts of rows, log what a single process with all rows does."""
    local = mesh_training.make_rows(0)
    for config, parts in (
        (Parallelism(data=1, context=8), 1),
        (Parallelism(data=1, tensor=8), 1),
        (Parallelism(data=2, context=4), 2),
        (Parallelism(data=2, fsdp=4), 2),
    ):
        everything = jax.tree.map(lambda leaf, parts=parts: np.concatenate([leaf] * parts), local)
        expected, measured = measure_throughput(everything), measure_throughput(local, make_mesh(config))
        assert set(expected) == {"tokens_per_second", "model_flops_per_second", "mfu"}
        for name, value in expected.items():
            np.testing.assert_allclose(measured[name], value, rtol=1e-9, err_msg=f"{config}: {name}")


def main() -> None:
    """Train on both."""
    join_processes()
    config = Parallelism(data=1, context=8, context_attention="ring")
    assert RowPart.from_mesh(make_mesh(config))[:2] == (0, 1)
    actual = mesh_training.train(config, optimizer="sgd")
    expected = mesh_training.train(Parallelism(), optimizer="sgd", devices=jax.local_devices()[:1])
    mesh_training.assert_runs_are_equal(actual, expected, optimizer="sgd")
    check_throughput()
    print("done")


if __name__ == "__main__":
    main()
