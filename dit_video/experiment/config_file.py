"""Config files: Python files that define an `EXPERIMENT`."""

import runpy
import sys
from pathlib import Path

from dit_video.core import config_json
from dit_video.core.errors import MissingError, UserError
from dit_video.experiment.run import Experiment


def load_experiment(path: str | Path) -> Experiment:
    """Return the `EXPERIMENT` of a config file, which may import its neighbours by the name of their folder.

    Raises:
      MissingError: If the file does not exist.
      UserError: If it is not a `.py` file, defines no `EXPERIMENT`, or one that other processes could not read.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"config {path} does not exist; use a file such as experiments/configs/clips.py")
    if path.suffix != ".py":
        raise UserError(f"config {path} is not a Python file; use a file such as experiments/configs/clips.py")
    if (folder := str(path.resolve().parents[1])) not in sys.path:
        sys.path.append(folder)
    experiment = runpy.run_path(str(path)).get("EXPERIMENT")
    if not isinstance(experiment, Experiment):
        raise UserError(f"{path} defines no EXPERIMENT; assign it an Experiment(...)")
    config_json.to_portable_json(experiment)
    return experiment
