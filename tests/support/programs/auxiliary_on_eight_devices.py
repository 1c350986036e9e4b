"""Compare a denoiser's training with an auxiliary loss on meshes of eight devices with that on one device."""

import jax

from dit_video.distributed import Parallelism
from support import mesh_training
from support.extensions.alignment import Alignment


def main() -> None:
    """Train on all meshes."""
    options = {"optimizer": "sgd", "auxiliary": (Alignment(weight=2.0),)}
    expected = mesh_training.train(Parallelism(), devices=jax.devices()[:1], **options)
    assert any(path.startswith("auxiliary/alignment/") for path in expected[1])
    for parallel in (Parallelism(data=2, fsdp=4), Parallelism(data=1, fsdp=2, tensor=2, context=2)):
        actual = mesh_training.train(parallel, **options)
        print(parallel, abs(actual[0] / expected[0] - 1).max(), flush=True)
        assert actual[2] > 20
        mesh_training.assert_runs_are_equal(actual, expected, optimizer="sgd")
    print("done")


if __name__ == "__main__":
    main()
