"""Compare a denoiser's training on a mesh whose context axis spans two processes with that on one device."""

import jax

from dit_video.distributed import MeshConfig, RowPart, make_mesh
from support import mesh_training
from support.devices import join_processes


def main() -> None:
    """Train on both."""
    join_processes()
    config = MeshConfig(data=1, context=8, context_attention="ring")
    assert RowPart.from_mesh(make_mesh(config))[:2] == (0, 1)
    actual = mesh_training.train(config, optimizer="sgd")
    expected = mesh_training.train(MeshConfig(), optimizer="sgd", devices=jax.local_devices()[:1])
    mesh_training.assert_runs_are_equal(actual, expected, optimizer="sgd")
    print("done")


if __name__ == "__main__":
    main()
