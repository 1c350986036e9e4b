"""Config of a run: frozen, complete, and checked across its parts."""

from dit_video.experiment.config import Experiment
from dit_video.experiment.training_config import (
    AutoencoderTraining,
    Data,
    DenoiserTraining,
    GivenAutoencoder,
    OneOfTwo,
    Stage,
)

__all__ = [
    "AutoencoderTraining",
    "Data",
    "DenoiserTraining",
    "Experiment",
    "GivenAutoencoder",
    "OneOfTwo",
    "Stage",
]
