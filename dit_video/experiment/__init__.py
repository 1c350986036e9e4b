"""Config of a run: frozen, complete, and checked across its parts."""

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
