"""Config of a run: frozen, complete, and checked across its parts."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_video.experiment.config import Experiment as Experiment
    from dit_video.experiment.runtime import Stage as Stage
    from dit_video.experiment.runtime import StagedExperiment as StagedExperiment
    from dit_video.experiment.training_config import AllWeights as AllWeights
    from dit_video.experiment.training_config import AutoencoderTraining as AutoencoderTraining
    from dit_video.experiment.training_config import CurriculumStage as CurriculumStage
    from dit_video.experiment.training_config import DataConfig as DataConfig
    from dit_video.experiment.training_config import DenoiserTraining as DenoiserTraining
    from dit_video.experiment.training_config import ExpertConfig as ExpertConfig
    from dit_video.experiment.training_config import LoraAdapters as LoraAdapters
    from dit_video.experiment.training_config import PretrainedAutoencoder as PretrainedAutoencoder
    from dit_video.experiment.training_config import Student as Student
    from dit_video.experiment.training_config import TemporalWeights as TemporalWeights

_MODULES = {"Experiment": "config", "Stage": "runtime", "StagedExperiment": "runtime"}


def __getattr__(name: str) -> Any:
    """Import on first use: loading a finished pipeline needs nothing of what training imports."""
    if not name[0].isupper():  # a module
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'training_config')}"), name)
