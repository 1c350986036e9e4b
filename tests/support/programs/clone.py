"""Write the config of a run as a clone on PYTHONPATH does, for which no metadata of an installed package exist."""

import importlib.metadata
import sys
from pathlib import Path

get_distribution = importlib.metadata.distribution


def get_other_distribution(name: str) -> importlib.metadata.Distribution:
    if name == "dit-video":
        raise importlib.metadata.PackageNotFoundError(name)
    return get_distribution(name)


importlib.metadata.distribution = get_other_distribution

from dit_video.core.platform.provenance import get_code_version  # noqa: E402
from dit_video.experiment.config_file import load_experiment  # noqa: E402
from dit_video.experiment.run import Run  # noqa: E402

experiment = load_experiment(Path(__file__).parents[1] / "tiny.py")
Run.create(sys.argv[1], experiment)
assert Run.open(sys.argv[1]).experiment == experiment
print(get_code_version()["dit_video"])
