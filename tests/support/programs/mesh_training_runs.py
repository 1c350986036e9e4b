"""Compare a denoiser's training on meshes of eight devices with that on one device.

The arguments are `backbone`, `wan` or one of both and `accelerator`, whose rows and tokens stay two axes as on
accelerators; a list of pairs of mesh sizes and a method of context attention; and an optimizer.
"""

import ast
import dataclasses
import sys

import jax

from dit_video.distributed import AXES, Parallelism
from support import mesh_training


def main() -> None:
    """Train on all meshes."""
    name, *options = sys.argv[1].split()
    backbone = {"backbone": mesh_training.DIT, "wan": mesh_training.WAN}[name]
    if "accelerator" in options:
        backbone = dataclasses.replace(backbone, attention="chunked")
        jax.default_backend = lambda: "tpu"
    meshes, optimizer = ast.literal_eval(sys.argv[2]), sys.argv[3]
    expected = mesh_training.train(Parallelism(), backbone, optimizer=optimizer, devices=jax.devices()[:1])
    assert expected[2] == 0
    for sizes, method in meshes:
        config = Parallelism(**dict(zip(AXES, sizes, strict=True)), context_attention=method)
        actual = mesh_training.train(config, backbone, optimizer=optimizer)
        print(optimizer, sizes, method, abs(actual[0] / expected[0] - 1).max(), flush=True)
        assert (actual[2] > 20) == (sizes[0] < 8), actual[2]
        mesh_training.assert_runs_are_equal(actual, expected, optimizer=optimizer)
    print("done")


if __name__ == "__main__":
    main()
