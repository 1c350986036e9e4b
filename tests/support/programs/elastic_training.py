"""Continue a training on other devices of one host; the arguments are a case below and a folder."""

import sys
from pathlib import Path

import jax
import numpy as np

from dit_video.distributed import Parallelism, ShardingRules, make_mesh
from support.elastic_training import train


def assert_equal_up_to_rounding(actual: list[list[float]], expected: list[list[float]] | np.ndarray) -> None:
    """Compare losses and gradient norms.

    Processors sum in different orders, and Adam divides by the size of small gradients. After eight steps, float32
    leaves 6 digits of a loss; on some processors gradient norms differ by 1.6e-6, on others by less than 1e-6.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    np.testing.assert_allclose(actual[:, 0], expected[:, 0], rtol=1e-6)
    np.testing.assert_allclose(actual[:, 1], expected[:, 1], rtol=5e-6)


def check_device_counts(folder: Path) -> None:
    """Compare steps on one, two, four and eight devices with eight steps on one."""
    devices = jax.devices()
    expected = train(folder / "whole", make_mesh(Parallelism(), devices[:1]), 8)
    assert np.ptp(np.asarray(expected)[:, 0]) > 1e-3, expected
    actual = []
    for mesh in (
        make_mesh(Parallelism(), devices[:1]),
        make_mesh(Parallelism(), devices[:2]),
        make_mesh(Parallelism(data=2, fsdp=2), devices[:4]),
        make_mesh(Parallelism(data=1, fsdp=8), devices),
    ):
        actual += train(folder / "parts", mesh, 2)
    assert_equal_up_to_rounding(actual, expected)


def check_context(folder: Path) -> None:
    """Compare steps on meshes with `context`, which at first shares no state, with eight steps on one device."""
    devices = jax.devices()
    expected = train(folder / "whole", make_mesh(Parallelism(), devices[:1]), 8)
    mesh = make_mesh(Parallelism(data=1, fsdp=2, context=4), devices)
    replicated = ShardingRules(rules=((r"kernel$", (None, "fsdp")), ("", ())))
    actual = train(folder / "parts", mesh, 2, rules=replicated)
    for continued in (
        mesh,
        make_mesh(Parallelism(data=1, context=4), devices[:4]),
        make_mesh(Parallelism(data=1, fsdp=8), devices),
    ):
        actual += train(folder / "parts", continued, 2)
    assert_equal_up_to_rounding(actual, expected)


def start_on_one_host(folder: Path) -> None:
    """Save the expected losses of six steps, and take the first two."""
    mesh = make_mesh(Parallelism(), jax.devices()[:1])
    np.save(folder / "expected.npy", train(folder / "whole", mesh, 6))
    train(folder / "parts", mesh, 2)


def end_on_one_host(folder: Path) -> None:
    """Take the last two steps, after those of two hosts."""
    actual = train(folder / "parts", make_mesh(Parallelism(fsdp=2, data=-1)), 2)
    assert_equal_up_to_rounding(actual, np.load(folder / "expected.npy")[4:])


CASES = {
    "device counts": check_device_counts,
    "context": check_context,
    "start": start_on_one_host,
    "end": end_on_one_host,
}

if __name__ == "__main__":
    CASES[sys.argv[1]](Path(sys.argv[2]))
    print("done")
