"""Logits of C3D: those of the inception score of videos."""

from dataclasses import dataclass

from dit_video.evaluation.feature_functions.feature_function import FeatureFunction, OpenFeatures, make_identity
from dit_video.evaluation.feature_functions.network import NetworkInput, make_extractor
from dit_video.models.features.c3d import SIZE, C3d
from dit_video.weights.classifiers import load_c3d


@dataclass(frozen=True, kw_only=True)
class C3dLogits(FeatureFunction):
    """The 101 logits of C3D, fine-tuned on UCF-101, as TGAN's authors compute the score (arXiv 1611.06624).

    Clips of 16 frames are resized to 112×112 pixels with aligned corners, as Chainer does.
    """

    weights: str = "weights/conv3d_deepnetA_ucf.npz"
    """File of weights; see `dit_video.weights.classifiers.load_c3d`."""
    mean: str = "weights/mean2.npz"
    """File of the mean clip."""

    def load(self) -> OpenFeatures:
        """Read the weights."""
        params = load_c3d(self.weights, mean=self.mean)
        network_input = NetworkInput(side=SIZE.h, frames=SIZE.t, has_aligned_corners=True)
        extract = make_extractor(lambda rngs: C3d(rngs=rngs), params, network_input, batch=4)
        return OpenFeatures(extract, make_identity("C3D", self.weights, self.mean))
