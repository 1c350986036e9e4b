"""Find out in two processes which stages of a curriculum are done; the argument is the folder of a run."""

import dataclasses
import sys
from pathlib import Path

from support.devices import join_processes


def main() -> None:
    """Join the processes, and print the names of the stages that are not done."""
    join_processes()
    import jax

    from dit_video.experiment.run import Run

    jax.devices()  # a run's mesh does that
    run = Run.open(Path(sys.argv[1]))
    autoencoder, denoiser = run.stages
    first = dataclasses.replace(denoiser, name="small", steps=6)
    stages = (autoencoder, first, dataclasses.replace(denoiser, continues="small"))
    run = dataclasses.replace(run, experiment=dataclasses.replace(run.experiment, stages=stages))
    print("due:", *(stage.name for stage in run.stages if not stage.is_done(run)))


if __name__ == "__main__":
    main()
