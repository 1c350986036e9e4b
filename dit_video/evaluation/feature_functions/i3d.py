"""Features of I3D: those of the Fréchet video distance."""

from dataclasses import dataclass

from dit_video.evaluation.feature_functions.feature_function import FeatureFunction, OpenFeatures, make_identity
from dit_video.evaluation.feature_functions.network import NetworkInput, make_extractor
from dit_video.models.features.i3d import MIN_FRAMES, SIDE, I3d
from dit_video.weights.classifiers import load_i3d


@dataclass(frozen=True, kw_only=True)
class I3dFeatures(FeatureFunction):
    """The 400 logits of I3D, trained on Kinetics-400, as FVD is computed with pytorch-i3d (arXiv 1812.01717).

    Clips of at least 9 frames are resized to 224×224 pixels.
    """

    weights: str = "weights/i3d.safetensors"
    """File of weights; see `dit_video.weights.classifiers.load_i3d`."""

    def load(self) -> OpenFeatures:
        """Read the weights."""
        network_input = NetworkInput(side=SIDE, min_frames=MIN_FRAMES)
        extract = make_extractor(lambda rngs: I3d(rngs=rngs), load_i3d(self.weights), network_input, batch=4)
        return OpenFeatures(extract, make_identity("I3D", self.weights))
