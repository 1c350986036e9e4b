"""Config of a run: frozen, complete, and checked across its parts."""

from dit_video.experiment.config import Experiment
from dit_video.experiment.training_config import (
    AutoencoderTraining,
    DataConfig,
    DenoiserTraining,
    ExpertConfig,
    PretrainedAutoencoder,
    Stage,
)

__all__ = [
    "AutoencoderTraining",
    "DataConfig",
    "DenoiserTraining",
    "Experiment",
    "ExpertConfig",
    "PretrainedAutoencoder",
    "Stage",
]
