"""Features of VideoMAE: those of the content-debiased Fréchet video distance."""

from dataclasses import dataclass

from dit_video.evaluation.feature_functions.feature_function import FeatureFunction, OpenFeatures, make_identity
from dit_video.evaluation.feature_functions.network import NetworkInput, make_extractor
from dit_video.models.features.video_mae import VideoMaeConfig
from dit_video.weights.video_mae import load_video_mae


@dataclass(frozen=True, kw_only=True)
class VideoMaeFeatures(FeatureFunction):
    """The 1408 features of VideoMAE v2's ViT-g, which depend more on motion than I3D's do (arXiv 2404.12391).

    Clips of an even number of frames are resized to 224×224 pixels.
    """

    weights: str = "weights/video_mae.safetensors"
    """File of weights; see `dit_video.weights.video_mae.load_video_mae`."""

    def load(self) -> OpenFeatures:
        """Read the weights."""
        config = VideoMaeConfig()
        network_input = NetworkInput(side=config.side, min_frames=config.patch_frames)
        extract = make_extractor(config.make, load_video_mae(self.weights), network_input, batch=2)
        return OpenFeatures(extract, make_identity("VideoMAE", self.weights))
