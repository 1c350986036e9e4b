"""Features and logits of Inception-v3: those of the Fréchet and kernel inception distances, and of the score."""

from dataclasses import dataclass

from dit_video.evaluation.feature_functions.feature_function import FeatureFunction, OpenFeatures, make_identity
from dit_video.evaluation.feature_functions.network import NetworkInput, make_extractor
from dit_video.models.features.inception import SIDE, InceptionV3
from dit_video.weights.classifiers import load_inception


@dataclass(frozen=True, kw_only=True)
class InceptionFeatures(FeatureFunction):
    """The 2048 pooled features of Inception-v3, of every frame, in the variant of FID (arXiv 1706.08500).

    Frames are resized to 299×299 pixels.
    """

    weights: str = "weights/inception.safetensors"
    """File of weights; see `dit_video.weights.classifiers.load_inception`."""
    logits: bool = False
    """True for the 1008 logits of the inception score instead."""

    def load(self) -> OpenFeatures:
        """Read the weights."""
        extract = make_extractor(
            lambda rngs: InceptionV3(rngs=rngs),
            load_inception(self.weights),
            NetworkInput(side=SIDE),
            batch=16,
            is_image=True,
            output=InceptionV3.classify if self.logits else None,
        )
        name = "Inception-v3 logits" if self.logits else "Inception-v3"
        return OpenFeatures(extract, make_identity(name, self.weights), is_of_frames=True)
