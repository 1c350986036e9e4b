"""Find out in two processes which stages of a run are due; the argument is the folder of the run."""

import dataclasses
import sys
from pathlib import Path

from support.devices import join_processes


def main() -> None:
    """Join the processes, and print the names of the stages that are due."""
    join_processes()
    from dit_video.experiment import CurriculumStage
    from dit_video.experiment.run import Run

    run = Run.open(Path(sys.argv[1]))
    first = CurriculumStage(name="small", steps=6, data=dataclasses.replace(run.experiment.data, held_out=()))
    run = dataclasses.replace(run, experiment=dataclasses.replace(run.experiment, curriculum=(first,)))
    print("due:", *(stage.name for stage in run.stages if stage.name != "latents" and stage.is_due(run.runtime)))


if __name__ == "__main__":
    main()
