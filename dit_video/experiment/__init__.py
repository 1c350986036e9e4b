"""Config of a run: frozen, complete, and checked across its parts."""

from dit_video.experiment.data_config import DataConfig as DataConfig
from dit_video.experiment.run import Experiment as Experiment
from dit_video.experiment.run import Run as Run
from dit_video.experiment.run import Stage as Stage
from dit_video.experiment.several_models import JoinPipelines as JoinPipelines
from dit_video.experiment.several_models import TrainModel as TrainModel
from dit_video.experiment.stages.autoencoder import TrainAutoencoder as TrainAutoencoder
from dit_video.experiment.stages.denoiser import TrainDenoiser as TrainDenoiser
from dit_video.experiment.training_config import AllWeights as AllWeights
from dit_video.experiment.training_config import ExpertConfig as ExpertConfig
from dit_video.experiment.training_config import LoraAdapters as LoraAdapters
from dit_video.experiment.training_config import Student as Student
from dit_video.experiment.training_config import TemporalWeights as TemporalWeights
from dit_video.models.model_config import ModelConfig as ModelConfig
